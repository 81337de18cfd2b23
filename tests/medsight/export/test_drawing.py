"""The picture with the regions drawn over it."""

import numpy as np
import pytest
from PIL import Image

from medsight.export.drawing import PALETTE, draw_overlay


@pytest.mark.parametrize(("size", "drawn"), [((64, 32), 512), ((512, 700), 700), ((5000, 40), 2048)])
def test_an_overlay_is_large_enough_to_read_and_small_enough_to_open(size: tuple[int, int], drawn: int) -> None:
    masks = [np.zeros((size[1], size[0]), dtype=bool) for _ in range(9)]
    masks[0][: size[1] // 2, : size[0] // 2] = True
    masks[1][-1, -1] = True
    overlay = draw_overlay(Image.new("RGB", size), masks, [f"region {index} " * 30 for index in range(9)])
    assert overlay.width == max(512, round(size[0] * drawn / max(size)))
    assert overlay.height > round(size[1] * drawn / max(size))
    assert set(PALETTE) <= {color for _, color in overlay.getcolors(overlay.width * overlay.height)}


def test_an_overlay_fills_its_region_and_leaves_the_rest_of_the_image_as_it_was() -> None:
    image = Image.new("RGB", (512, 512), (100, 100, 100))
    mask = np.zeros((512, 512), dtype=bool)
    mask[100:300, 100:300] = True
    drawn = np.asarray(draw_overlay(image, [mask], ["square"]))
    assert (drawn[150, 130] != 100).any() and (drawn[150, 130] != PALETTE[0]).any()
    assert (drawn[150, 100] == PALETTE[0]).all()
    assert (drawn[400:500, 400:500] == 100).all()
