"""Pictures of regions: over one image, and over the slices of a volume."""

from collections.abc import Sequence
from math import ceil, sqrt

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medsight.scans.scan import Scan

from .drawing import FONT_SIZE, MAX_SIDE, add_legend, draw_overlay, draw_regions
from .regions import FoundRegion, check_regions, group_by_label, measure


Window = str | tuple[float, float] | None
MAX_TILES = 36
TILE_SIDE = 320


def overlay(image: Image.Image, regions: Sequence[FoundRegion]) -> Image.Image:
    """`regions`, numbered from 1, over `image`, with a legend of labels and codes.

    Args:
        image: the slice or picture, 8-bit.
        regions: all of one slice, at the image's size or on the slice's own pixels.

    Raises:
        ValueError: a mask is not of that size.
    """
    labels = [f"{' '.join(region.label.split())}  {region.code}" for region in regions]
    return draw_overlay(image.convert("RGB"), [region.mask for region in regions], labels)


def mosaic(scan: Scan, regions: Sequence[FoundRegion], window: Window = None) -> Image.Image:
    """The slices that have regions, side by side, a colour and number a label; their volumes are in the legend.

    Shows 36 slices at most: of more, evenly many are left out between the first and the last, and the legend says so.
    Without regions it is the middle slice.

    Args:
        window: as `Scan.slice_image` takes it.

    Raises:
        ValueError: a region does not fit the scan.
    """
    check_regions(scan, regions)
    labels = group_by_label(regions)
    slices = sorted({region.slice_index for region in regions}) or [scan.num_slices // 2]
    evenly = np.linspace(0, len(slices) - 1, min(len(slices), MAX_TILES)).round().astype(int)
    shown = [slices[position] for position in evenly]
    empty = np.zeros((scan.height, scan.width), dtype=bool)
    tiles = []
    for index in shown:
        masks = [label.masks.get(index, empty) for label in labels]
        tile = draw_regions(scan.slice_image(index, window).convert("RGB"), masks, TILE_SIDE)
        font = ImageFont.load_default(FONT_SIZE)
        ImageDraw.Draw(tile).text((4, 4), f"slice {index}", "white", font, stroke_width=2, stroke_fill="black")
        tiles.append(tile)
    columns = ceil(sqrt(len(tiles)))
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, ceil(len(tiles) / columns) * height))
    for position, tile in enumerate(tiles):
        sheet.paste(tile, (position % columns * width, position // columns * height))
    sheet.thumbnail((MAX_SIDE, MAX_SIDE))
    volumes = measure(scan, regions).volume_ml
    lines = [name if volume is None else f"{name}  {volume:.1f} ml" for name, volume in volumes.items()]
    note = f"{len(shown)} of {len(slices)} slices with regions" if len(shown) < len(slices) else None
    return add_legend(sheet, lines, note)
