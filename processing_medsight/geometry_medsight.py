"""How an image of any size lies in the model's fixed input, and how masks travel both ways.

Along each axis, a point at `y` pixels from the image's top (pixel j covers [j, j + 1), its centre is at j + 0.5) lies
in the model's input at `y * scaled / length + offset`. That one line, and its inverse, is all the geometry there is:
pixels, mask labels and mask logits all go through it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch


Position = TypeVar("Position", float, np.ndarray)
FITS = ("pad", "stretch", "crop")


@dataclass(frozen=True)
class AxisFit:
    """One axis of an image in the model's input.

    Attributes:
        length: pixels of the original image along this axis.
        size: pixels of the model's input.
        scaled: pixels that the whole image takes after the resize.
        offset: where the resized image begins in the input; negative where a crop cuts it.
    """

    length: int
    size: int
    scaled: int
    offset: int

    @property
    def visible(self) -> tuple[int, int]:
        """Pixels of the input that show the image: the first, and the one after the last."""
        return max(0, self.offset), min(self.size, self.offset + self.scaled)

    def to_original(self, position: Position) -> Position:
        """Positions in the input, in pixels, to positions in the original image, in pixels."""
        return (position - self.offset) * self.length / self.scaled

    def to_input(self, position: Position) -> Position:
        """Positions in the original image, in pixels, to positions in the input, in pixels."""
        return position * self.scaled / self.length + self.offset


def fit_image(original: tuple[int, int], size: tuple[int, int], fit: str) -> tuple[AxisFit, AxisFit]:
    """Place an image in the model's input.

    Args:
        original: (height, width) of the image in pixels.
        size: (height, width) of the model's input in pixels.
        fit: `pad` keeps the aspect ratio and centres the image on black; `stretch` scales each axis on its own; `crop`
            scales until the input is covered and keeps the centre (the released checkpoint's transform, with
            torchvision's rounding).

    Returns:
        The vertical and the horizontal axis.

    Raises:
        ValueError: for an unknown `fit` or a size below one pixel.
    """
    (height, width), (out_height, out_width) = original, size
    if min(height, width, out_height, out_width) < 1:
        raise ValueError(f"an image of {height}x{width} pixels cannot be fitted into {out_height}x{out_width} pixels")
    if fit == "stretch":
        return AxisFit(height, out_height, out_height, 0), AxisFit(width, out_width, out_width, 0)
    if fit not in FITS:
        raise ValueError(f"fit={fit!r}: choose one of {', '.join(FITS)}")
    height_is_tighter = out_height * width <= out_width * height  # out_height / height <= out_width / width
    if fit == "pad":
        if height_is_tighter:
            scaled = out_height, max(1, (2 * out_height * width + height) // (2 * height))
        else:
            scaled = max(1, (2 * out_width * height + width) // (2 * width)), out_width
        offset = (out_height - scaled[0]) // 2, (out_width - scaled[1]) // 2
    else:
        if height_is_tighter:
            scaled = out_width * height // width, out_width
        else:
            scaled = out_height, out_height * width // height
        offset = -round((scaled[0] - out_height) / 2), -round((scaled[1] - out_width) / 2)
    return AxisFit(height, out_height, scaled[0], offset[0]), AxisFit(width, out_width, scaled[1], offset[1])


def mask_to_grid(mask: np.ndarray, vertical: AxisFit, horizontal: AxisFit, grid: tuple[int, int]) -> np.ndarray:
    """Carry a mask of the original image onto a grid over the model's input.

    A cell's value is the share of its area that the mask covers; padding counts as not covered. Unlike nearest
    sampling, this neither loses a lesion smaller than a cell nor moves an edge.

    Args:
        mask: (height, width) float32, the share of each original pixel that is inside (0 or 1, as a rule).
        grid: (h, w) cells.

    Returns:
        (h, w) float32 in [0, 1].
    """
    return (_coverage(vertical, grid[0]) @ mask @ _coverage(horizontal, grid[1]).T).clip(0.0, 1.0)


def grid_to_masks(logits: torch.Tensor, vertical: AxisFit, horizontal: AxisFit, threshold: float) -> torch.Tensor:
    """Carry mask logits on a grid over the model's input back to the original image's pixels, as masks.

    Args:
        logits: (n, h, w), before the sigmoid.
        threshold: probability above which a pixel is inside.

    Returns:
        (n, height, width) bool, on the device of `logits`; `False` where a crop left the image out.
    """
    cut = torch.logit(torch.tensor(float(threshold), dtype=torch.float64)).item()
    out = torch.empty((len(logits), vertical.length, horizontal.length), dtype=torch.bool, device=logits.device)
    for i, pixels in enumerate(grid_to_pixels(logits, vertical, horizontal)):
        out[i] = pixels > cut
    return out


def grid_to_pixels(logits: torch.Tensor, vertical: AxisFit, horizontal: AxisFit) -> Iterator[torch.Tensor]:
    """Mask logits at the original image's pixels: interpolated bilinearly, once, straight at the pixels' centres.

    One mask at a time: at the size of a radiograph, float logits of twenty masks would fill the memory.

    Args:
        logits: (n, h, w), before the sigmoid.

    Yields:
        (height, width) float32, on the device of `logits`; minus infinity where a crop left the image out.
    """
    top, bottom, down, seen_rows = _samples(vertical, logits.shape[1], logits.device)
    left, right, across, seen_columns = _samples(horizontal, logits.shape[2], logits.device)
    seen = seen_rows[:, None] & seen_columns[None, :]
    for mask in logits.float().clamp(-1e6, 1e6):  # infinities do not interpolate
        mask = torch.lerp(mask[:, left], mask[:, right], across[None, :])
        mask = torch.lerp(mask[top], mask[bottom], down[:, None])
        yield mask.masked_fill_(~seen, -torch.inf)


def _coverage(axis: AxisFit, cells: int) -> np.ndarray:
    """(cells, length): the share of each cell that each original pixel covers."""
    edges = axis.to_original(np.arange(cells + 1) * axis.size / cells)[:, None]
    pixels = np.arange(axis.length)[None, :]
    overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return (overlap.clip(0.0) / (edges[1:] - edges[:-1])).astype(np.float32)


def _samples(
    axis: AxisFit, cells: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each original pixel: the two cells it lies between, the second's weight, whether the input shows it."""
    position = axis.to_input(np.arange(axis.length) + 0.5)
    cell = (position * cells / axis.size - 0.5).clip(0, cells - 1)
    first = np.floor(cell).astype(np.int64)
    second = np.minimum(first + 1, cells - 1)
    weight = (cell - first).astype(np.float32)
    seen = (position >= 0) & (position <= axis.size)
    return tuple(torch.from_numpy(values).to(device) for values in (first, second, weight, seen))
