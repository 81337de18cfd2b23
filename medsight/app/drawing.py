"""Regions and heat maps over a slice, as the page shows them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from medsight.export.drawing import PALETTE, draw_regions, heat_map, readable_side, scaled_size
from processing_medsight.geometry_medsight import fit_image, grid_to_pixels


MIN_SIDE, MAX_SIDE = 640, 1280  # pixels of the longer side of a shown picture


def color_of(number: int) -> str:
    """The colour of a region, in mask and words, as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*PALETTE[number % len(PALETTE)])


def draw_layers(image: Image.Image, masks: Mapping[int, np.ndarray]) -> Image.Image:
    """The slice, 8-bit, L or RGB, with masks over it by the regions' numbers, at 640 to 1,280 pixels."""
    nothing = np.zeros((image.height, image.width), dtype=bool)
    drawn = [masks.get(number, nothing) for number in range(max(masks, default=-1) + 1)]
    return draw_regions(image.convert("RGB"), drawn, readable_side(image, MIN_SIDE, MAX_SIDE))


def draw_heat_map(image: Image.Image, logits: Any, processor: Any) -> Image.Image:
    """The slice in grey with the probabilities of one region over it as heat, at the size of `draw_layers`."""
    images = processor.image_processor
    axes = fit_image((image.height, image.width), (images.size["height"], images.size["width"]), images.fit)
    (pixels,) = grid_to_pixels(logits[None], *axes)
    size = scaled_size(image, readable_side(image, MIN_SIDE, MAX_SIDE))
    return heat_map(image.resize(size, Image.Resampling.BICUBIC), pixels.sigmoid().numpy())
