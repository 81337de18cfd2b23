"""Regions and heat maps over a slice, as the page shows them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage, special

from medsight.overlay import PALETTE, draw_regions
from processing_medsight.geometry_medsight import fit_image

from .session import Finding


MIN_SIDE, MAX_SIDE = 640, 1280  # pixels of the longer side of a shown picture


def color_of(number: int) -> str:
    """The colour of a region, in mask and words, as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*PALETTE[number % len(PALETTE)])


def mask_of(finding: Finding, size: tuple[int, int], processor: Any, threshold: float) -> np.ndarray:
    """Boolean mask of a region at the slice's (height, width)."""
    return processor.post_process_masks([finding.logits[None]], [size], threshold)[0][0].cpu().numpy()


def draw_layers(image: Image.Image, masks: Sequence[np.ndarray | None]) -> Image.Image:
    """The slice with `masks` over it, drawn at 640 to 1,280 pixels.

    Args:
        image: 8-bit, L or RGB.
        masks: boolean, at the image's size, by the regions' numbers; `None` for those that are not to be seen.
    """
    nothing = np.zeros((image.height, image.width), dtype=bool)
    drawn = [nothing if mask is None else mask for mask in masks]
    return draw_regions(image.convert("RGB"), drawn, _side(image))


def draw_heat_map(image: Image.Image, logits: Any, processor: Any) -> Image.Image:
    """The slice in grey with the probabilities of one region over it as heat, at the size of `draw_layers`."""
    from medsight.evaluation.codes import heat_map

    images = processor.image_processor
    model_input = images.size["height"], images.size["width"]
    probabilities = probabilities_on_image(np.asarray(logits), (image.height, image.width), model_input, images.fit)
    scale = _side(image) / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return heat_map(image.resize(size, Image.Resampling.BICUBIC), probabilities)


def probabilities_on_image(
    logits: np.ndarray, image: tuple[int, int], model_input: tuple[int, int], fit: str
) -> np.ndarray:
    """(h, w) mask logits on a grid over the model's input, as probabilities at the pixels of an image.

    Interpolated as the masks are: where the probability is above a threshold, there is the mask of that threshold.

    Args:
        image, model_input: (height, width) in pixels.
        fit: how the image lies in the input, as `fit_image` has it.

    Returns:
        (height, width) float32; 0 where a crop left the image out of the model's sight.
    """
    axes = fit_image(image, model_input, fit)
    places = [axis.to_input(np.arange(axis.length) + 0.5) for axis in axes]
    cells = [
        (place * count / axis.size - 0.5).clip(0, count - 1)
        for place, axis, count in zip(places, axes, logits.shape, strict=True)
    ]
    grid = np.meshgrid(*cells, indexing="ij")
    values = special.expit(ndimage.map_coordinates(logits.astype(np.float32).clip(-100, 100), grid, order=1))
    seen = [(place >= 0) & (place <= axis.size) for place, axis in zip(places, axes, strict=True)]
    return np.where(seen[0][:, None] & seen[1][None, :], values, np.float32(0))


def _side(image: Image.Image) -> int:
    return min(max(*image.size, MIN_SIDE), MAX_SIDE)
