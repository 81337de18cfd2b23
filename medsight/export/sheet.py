"""Rows of a data set as a contact sheet: images with their masks outlined, and what these show."""

from collections.abc import Iterable, Mapping
from typing import Any

from PIL import Image

from medsight.data.pictures import read_mask, read_picture
from medsight.scans.opening import open_scan

from .drawing import contact_sheet, draw_regions


SIDE = 320  # pixels of the longer side of an image


def sheet_of_rows(title: str, subtitle: str, rows: Iterable[Mapping[str, Any]]) -> Image.Image:
    """Images with their masks outlined and numbered; below each what the numbers are.

    Args:
        rows: of `medsight.data.schema.REGION_FEATURES`.

    Raises:
        OSError, ValueError: a picture or mask cannot be read, or a mask is of another size.
    """
    tiles = []
    for row in rows:
        picture = read_picture(row["image"])
        masks = [read_mask(entry, picture.size) for entry in row["masks"]]
        seen = open_scan(picture).slice_image(0).convert("RGB")
        names = ", ".join(f"{number} {target}" for number, target in enumerate(row["targets"], 1))
        tiles.append((draw_regions(seen, masks, SIDE), names or "no mask"))
    return contact_sheet(title, subtitle, tiles, SIDE)
