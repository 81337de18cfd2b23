"""What the rest of the model reads from the image encoder: a grid of features and a summary for the group
classifier."""

from typing import Any

import torch
from torch import nn


def encode_image(
    vision_tower: nn.Module, pixel_values: torch.Tensor, config: Any, any_size: bool = False, **kwargs: Any
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Run the encoder and take hidden state `config.vision_feature_layer`.

    Args:
        pixel_values: (batch, 3, H, W), H = W = `config.image_size`.
        any_size: take another H = W too, a multiple of the encoder's stride, as a convolutional encoder can.

    Returns:
        The encoder's own output, the feature grid (batch, h, w, d), and a summary (batch, d): the CLS row, or the mean
        of the grid where the encoder has none.

    Raises:
        ValueError: for pixel values of another shape, or an encoder whose features make no such grid.
    """
    side = pixel_values.shape[-1] if any_size else config.image_size
    expected = (3, side, side)
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; expected (images, {', '.join(map(str, expected))})"
        )
    height, width = (cells * side // config.image_size for cells in config.patch_grid)
    kwargs = {**kwargs, "output_hidden_states": True, "return_dict": True}
    outputs = vision_tower(pixel_values.to(vision_tower.dtype), **kwargs)
    hidden = outputs.hidden_states[config.vision_feature_layer]
    images, dim = len(pixel_values), config.vision_hidden_size
    if hidden.ndim == 4 and hidden.shape == (images, dim, height, width):
        grid = hidden.permute(0, 2, 3, 1)
        return outputs, grid, grid.mean(dim=(1, 2))
    prefix = hidden.shape[1] - height * width
    if hidden.ndim != 3 or prefix < 0 or (len(hidden), hidden.shape[2]) != (images, dim):
        raise ValueError(
            f"vision_config.model_type={config.vision_config.model_type!r} gives features of shape "
            f"{tuple(hidden.shape)} where a grid ({images}, {dim}, {height}, {width}), or its cells as rows, is "
            "needed: use another encoder"
        )
    grid = hidden[:, prefix:].unflatten(1, (height, width))
    return outputs, grid, hidden[:, 0] if prefix else hidden.mean(dim=1)
