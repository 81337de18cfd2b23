"""Regions and heat maps over a slice, as the page shows them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from medsight.export.drawing import PALETTE, draw_regions, heat_map, readable_side, scaled_size
from processing_medsight.geometry_medsight import fit_image, grid_to_pixels

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
    return draw_regions(image.convert("RGB"), drawn, readable_side(image, MIN_SIDE, MAX_SIDE))


def draw_heat_map(image: Image.Image, logits: Any, processor: Any) -> Image.Image:
    """The slice in grey with the probabilities of one region over it as heat, at the size of `draw_layers`."""
    images = processor.image_processor
    axes = fit_image((image.height, image.width), (images.size["height"], images.size["width"]), images.fit)
    (pixels,) = grid_to_pixels(logits[None], *axes)
    size = scaled_size(image, readable_side(image, MIN_SIDE, MAX_SIDE))
    return heat_map(image.resize(size, Image.Resampling.BICUBIC), pixels.sigmoid().numpy())
