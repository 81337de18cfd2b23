"""Heat maps lie where the masks lie."""

import numpy as np
import pytest
import torch
from PIL import Image

from medsight.app.drawing import draw_heat_map, draw_layers
from processing_medsight import MedSightImageProcessor
from processing_medsight.geometry_medsight import fit_image, grid_to_pixels


@pytest.mark.parametrize("fit", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("size", [(30, 47), (120, 64), (9, 9)])
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_where_the_probability_is_above_a_threshold_is_the_mask_of_that_threshold(
    fit: str, size: tuple[int, int], threshold: float
) -> None:
    logits = torch.randn(7, 7, generator=torch.Generator().manual_seed(0)) * 3
    processor = MedSightImageProcessor(size={"height": 56, "width": 56}, fit=fit)
    mask = processor.post_process_masks([logits[None]], [size], threshold)[0][0].numpy()
    (pixels,) = grid_to_pixels(logits[None], *fit_image(size, (56, 56), fit))
    probabilities = pixels.sigmoid().numpy()
    clear = np.abs(probabilities - threshold) > 1e-5
    assert ((probabilities > threshold) == mask)[clear].all() and clear.mean() > 0.95


def test_a_heat_map_and_layers_have_the_same_size(tiny_predictor: object) -> None:
    image = Image.fromarray(np.full((50, 80), 90, dtype=np.uint8))
    heat = draw_heat_map(image, torch.full((5, 5), -9.0), tiny_predictor.processor)  # type: ignore[attr-defined]
    assert heat.size == draw_layers(image, {}).size == (640, 400)
    assert np.abs(np.asarray(heat).astype(int) - 90).max() <= 1  # where nothing is likely, the picture shows
