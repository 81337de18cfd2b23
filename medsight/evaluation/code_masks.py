"""Masks of region codes from the codebook alone: its entry of a code is the query, in place of a language state."""

from collections.abc import Sequence
from typing import Any

import torch


def code_mask_logits(model: Any, image_features: Any, codes: torch.Tensor) -> torch.Tensor:
    """The masks that region codes decode to in one image.

    Args:
        model: with a trained codebook.
        image_features: (H, W, d), the perceiver's map of the image.
        codes: (n, 2) long, group and index within the group.

    Returns:
        (n, H, W), before the sigmoid.
    """
    base = model.model
    groups, indices = codes.to(model.device).unbind(1)
    queries = base.codebook.decode(base.codebook.code_table()[groups, indices])[None]
    return base.region_perceiver.segmentation_head(queries, image_features[None])[0][0]


def masks_from_codes(model: Any, output: Any, pixel_values: Any, images: Sequence[int]) -> Any:
    """What `generate` returned, with masks from the codebook alone. The scores, which weigh the other masks, go.

    Args:
        output: with `mask_logits` and `region_codes`, an entry a row.
        pixel_values: all images of the rows, in order.
        images: how many each row has; codes belong to its last one.

    Raises:
        ValueError: the model has no codebook.
    """
    if not model.config.use_region_codebook:
        raise ValueError("the model has no region codebook: its masks are decoded from states alone")
    last, first, size = -1, model.config.region_code_start_id, model.config.codes_per_group
    with torch.inference_mode():
        features = None if pixel_values is None else model.get_region_features(pixel_values).image_features
        masks = []
        for count, ids, logits in zip(images, output.region_codes, output.mask_logits, strict=True):
            last += count
            if count and len(ids) and features is not None:
                numbers = torch.as_tensor(ids) - first
                logits = code_mask_logits(model, features[last], torch.stack([numbers // size, numbers % size], 1))
            masks.append(logits)
    return type(output)(**{**output, "mask_logits": masks, "region_scores": None})
