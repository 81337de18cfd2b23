"""Heat maps lie where the masks lie."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from medsight.app.drawing import draw_heat_map, draw_layers


def test_a_heat_map_is_warm_where_the_mask_lies_and_shows_the_picture_elsewhere(tiny_predictor: Any) -> None:
    image, logits = Image.fromarray(np.full((50, 80), 90, dtype=np.uint8)), torch.full((5, 5), -9.0)
    logits[:, 3:] = 9
    heat = draw_heat_map(image, logits, tiny_predictor.processor)
    ((mask,),) = tiny_predictor.processor.post_process_masks([logits[None]], [(400, 640)])
    assert heat.size == draw_layers(image, {}).size == (640, 400)
    changed = np.abs(np.asarray(heat).astype(int) - 90).max(axis=2) > 1
    assert changed[mask.numpy()].all() and not changed[:, :256].any()
