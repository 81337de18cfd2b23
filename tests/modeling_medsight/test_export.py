"""What sees, as a graph for other runtimes: torch.export and ONNX, for any number of images."""

from pathlib import Path

import pytest
import torch
from torch import nn

from modeling_medsight import MedSightRegionModel

from .configurations import make_config, make_pixels


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet-qwen2-auxiliary-loss", "unet-qwen3-pooled")]


class Seen(nn.Module):
    """Masks, their classes and the group, as plain tensors."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = MedSightRegionModel(make_config(name)).eval()

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        regions = self.model(pixel_values)
        return regions.masks_queries_logits, regions.class_queries_logits, regions.group_logits


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip-qwen3", *SLOW])
def test_one_exported_graph_takes_any_number_of_images(name: str) -> None:
    seen = Seen(name)
    graph = torch.export.export(
        seen, (make_pixels(seen.model.config, 2),), dynamic_shapes=({0: torch.export.Dim("images", max=64)},)
    ).module()
    for images in (1, 2, 5):
        pixels = make_pixels(seen.model.config, images)
        torch.testing.assert_close(graph(pixels), seen(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_gives_the_same_masks(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    seen = Seen("clip-qwen3")
    pixels = make_pixels(seen.model.config, 2)
    torch.onnx.export(
        seen,
        (pixels,),
        tmp_path / "regions.onnx",
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("images", max=64)},),
    )
    session = onnxruntime.InferenceSession(tmp_path / "regions.onnx")
    for images in (2, 3):
        pixels = make_pixels(seen.model.config, images)
        given = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
        expected = [tensor.numpy() for tensor in seen(pixels)]
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
