"""The region perceiver against its formulas, written out a second time, slowly, from the architecture document."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from configuration_medsight import MedSightConfig
from modeling_medsight import MedSightModel
from modeling_medsight.region_perceiver_medsight import CrossAttention, RegionPerceiver

from .configurations import noise


IMPLEMENTATIONS = ("eager", "sdpa")
Weights = dict[str, torch.Tensor]


def make_perceiver(seed: int = 0, implementation: str = "eager", **overrides: Any) -> RegionPerceiver:
    torch.manual_seed(seed)
    config = MedSightConfig.from_preset("tiny", attn_implementation=implementation, **overrides)
    perceiver = MedSightModel(config).region_perceiver.double().eval()
    with torch.no_grad():
        for name, weight in perceiver.named_parameters():
            if weight.ndim == 1:  # norms and biases start at 1 and 0, where a mistake would not show
                weight.add_(0.2 * torch.randn_like(weight))
            assert weight.isfinite().all(), name
    return perceiver


def slow_position(height: int, width: int, dim: int) -> torch.Tensor:
    table = torch.zeros(height, width, dim, dtype=torch.float64)
    half = dim // 2
    for y in range(height):
        for x in range(width):
            for axis, (at, length) in enumerate(((y, height), (x, width))):
                for i in range(half):
                    angle = (at + 1) / (length + 1e-6) * 2 * math.pi / 10000 ** (2 * (i // 2) / half)
                    table[y, x, axis * half + i] = math.sin(angle) if i % 2 == 0 else math.cos(angle)
    return table


def slow_norm(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * w[name + ".weight"] + w[name + ".bias"]


def slow_attention(
    w: Weights, name: str, a: torch.Tensor, b: torch.Tensor, visible: torch.Tensor | None, heads: int
) -> torch.Tensor:
    """One sample: a (n, d) attends to b (m, d) where `visible` (n, m) is true; then residual and norm."""
    normed = slow_norm(w, name + ".attention.norm_context", b)
    q = slow_norm(w, name + ".attention.norm_queries", a) @ w[name + ".attention.to_q.weight"].T
    k, v = (normed @ part.T for part in w[name + ".attention.to_kv.weight"].chunk(2))
    width = q.shape[1] // heads
    rows = []
    for i in range(len(a)):
        parts = []
        for h in range(heads):
            at = slice(h * width, (h + 1) * width)
            scores = torch.stack([q[i, at] @ k[j, at] for j in range(len(b))]) / math.sqrt(width)
            if visible is not None:
                scores = torch.where(visible[i], scores, torch.tensor(-1e30, dtype=scores.dtype))
            parts.append(scores.softmax(0) @ v[:, at])
        rows.append(torch.cat(parts))
    return slow_norm(w, name + ".norm", a + torch.stack(rows) @ w[name + ".attention.to_out.weight"].T)


def slow_feed_forward(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    inner = slow_norm(w, name + ".norm_in", x) @ w[name + ".linear_1.weight"].T
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return slow_norm(w, name + ".norm_out", x + inner @ w[name + ".linear_2.weight"].T)


def slow_head(w: Weights, queries: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    head = "segmentation_head."
    projected = queries @ w[head + "mask_projection.weight"].T + w[head + "mask_projection.bias"]
    classes = queries @ w[head + "class_predictor.weight"].T + w[head + "class_predictor.bias"]
    return torch.einsum("nd,hwd->nhw", projected, features), classes


def upsampled(image: torch.Tensor) -> torch.Tensor:
    """(channels, h, w), doubled bilinearly."""
    return F.interpolate(image[None], scale_factor=2, mode="bilinear", align_corners=False)[0]


def slow_perceiver(w: Weights, patches: torch.Tensor, queries: torch.Tensor, stages: int, heads: int = 2) -> list:
    """One sample, all of it: [(masks, classes, queries, features) after the initial step and after each stage]."""
    dim = patches.shape[-1]
    features = patches + slow_position(*patches.shape)
    queries = slow_attention(w, "initial_attention", queries, features.flatten(0, 1), None, heads)
    queries = slow_feed_forward(w, "initial_feed_forward", queries)
    steps = [(*slow_head(w, queries, features), queries, features)]
    for i in range(stages):
        name = f"stages.{i}."
        grid = upsampled(features.permute(2, 0, 1))
        grid = F.conv2d(grid[None], w[name + "adapter.weight"], w[name + "adapter.bias"], padding=1)[0]
        features = grid.permute(1, 2, 0) + slow_position(*grid.shape[1:], dim)
        visible = (upsampled(steps[-1][0]).sigmoid() >= 0.5).flatten(1)
        pixels = features.flatten(0, 1)
        queries = slow_attention(w, name + "region_to_image", queries, pixels, visible, heads)
        queries = slow_feed_forward(w, name + "region_feed_forward", queries)
        pixels = slow_attention(w, name + "image_to_region", pixels, queries, None, heads)
        pixels = slow_feed_forward(w, name + "image_feed_forward", pixels)
        features = pixels.reshape(features.shape)
        steps.append((*slow_head(w, queries, features), queries, features))
    return steps


@pytest.mark.parametrize("own_queries", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("seed", "stages"), [(0, 1), (1, 2)])
def test_the_perceiver_is_its_formulas(seed: int, stages: int, implementation: str, own_queries: bool) -> None:
    perceiver = make_perceiver(seed, implementation, perceiver_num_stages=stages, auxiliary_loss=True)
    weights = dict(perceiver.named_parameters())
    patches = noise(2, 2, 3, 16, seed=seed)
    queries = None if own_queries else noise(2, 3, 16, seed=seed + 1)
    output = perceiver(patches, queries=queries)
    for b in range(2):
        asked = weights["region_queries"][0] if queries is None else queries[b]
        *earlier, (masks, classes, regions, features) = slow_perceiver(weights, patches[b], asked, stages)
        torch.testing.assert_close(output.masks_queries_logits[b], masks, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.class_queries_logits[b], classes, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.region_embeddings[b], regions, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.image_features[b], features, rtol=1e-5, atol=1e-5)
        assert len(output.auxiliary_logits) == len(earlier) == stages
        for given, expected in zip(output.auxiliary_logits, earlier, strict=True):
            torch.testing.assert_close(given["masks_queries_logits"][b], expected[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(given["class_queries_logits"][b], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing_attends_uniformly(implementation: str) -> None:
    attention: CrossAttention = make_perceiver(implementation=implementation).stages[0].region_to_image.attention
    queries, context = noise(2, 3, 16), noise(2, 7, 16, seed=1)
    visible = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(2)) > 0.5
    visible[0, 1] = visible[1, 2] = False
    output = attention(queries, context, visible)
    for b, blind in ((0, 1), (1, 2)):
        values = attention.to_kv(attention.norm_context(context[b])).chunk(2, dim=-1)[1]
        torch.testing.assert_close(output[b, blind], attention.to_out(values.mean(0)))
    others = visible.any(-1)
    unmasked = attention(queries, context)
    assert not torch.isclose(output[others], unmasked[others]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hidden_pixels_have_no_say_in_any_dtype(implementation: str, dtype: torch.dtype) -> None:
    attention: CrossAttention = make_perceiver(implementation=implementation).stages[0].region_to_image.attention
    attention = attention.to(dtype)
    queries, context = noise(1, 2, 16).to(dtype), noise(1, 6, 16, seed=1).to(dtype)
    visible = torch.tensor([[[True, False, True, False, True, False], [False, False, True, False, False, False]]])
    changed = context.clone()
    changed[:, [1, 3, 5]] = 30
    output = attention(queries, context, visible)
    assert output.isfinite().all()
    torch.testing.assert_close(attention(queries, changed, visible), output, rtol=0, atol=0)
    assert not torch.equal(attention(queries, changed), attention(queries, context))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries_that_only_pad_a_batch_change_nothing(implementation: str) -> None:
    perceiver = make_perceiver(implementation=implementation)
    patches, queries = noise(3, 4, 4, 16), noise(3, 4, 16, seed=1)
    counts = (4, 1, 2)
    known = torch.arange(4) < torch.tensor(counts)[:, None]
    batch = perceiver(patches, queries=queries, query_mask=known)
    junk = torch.where(known[..., None], queries, torch.full_like(queries, 9.0))
    other = perceiver(patches, queries=junk, query_mask=known)
    for b, n in enumerate(counts):
        alone = perceiver(patches[b : b + 1], queries=queries[b : b + 1, :n])
        for output in (batch, other):
            torch.testing.assert_close(output.masks_queries_logits[b, :n], alone.masks_queries_logits[0])
            torch.testing.assert_close(output.image_features[b], alone.image_features[0])
    unmasked = perceiver(patches, queries=junk)
    assert not torch.allclose(unmasked.image_features[1], batch.image_features[1])


@torch.no_grad()
def test_every_layer_is_called_so_that_hooks_and_adapters_have_their_say() -> None:
    perceiver, called = make_perceiver(), set()
    layers = {name: module for name, module in perceiver.named_modules() if not list(module.children())}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
    perceiver(noise(1, 3, 3, 16))
    assert called == set(layers)


def test_no_gradient_flows_through_the_attention_mask() -> None:
    perceiver = make_perceiver(perceiver_num_stages=1)
    patches = noise(1, 3, 3, 16)
    perceiver(patches).region_embeddings.sum().backward()
    # The head only makes the mask here: its own outputs are not in the sum.
    assert perceiver.segmentation_head.mask_projection.weight.grad is None
    assert perceiver.region_queries.grad.abs().sum() > 0


def test_a_pixel_of_exactly_one_half_is_seen() -> None:
    perceiver = make_perceiver()
    with torch.no_grad():
        perceiver.segmentation_head.mask_projection.weight.zero_()
        perceiver.segmentation_head.mask_projection.bias.zero_()
    patches, asked = noise(1, 2, 2, 16), noise(1, 3, 16, seed=1)
    seen: list[torch.Tensor] = []
    perceiver.stages[0].region_to_image.attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    perceiver(patches, queries=asked)
    assert seen[0].all()


def test_attention_goes_through_the_attention_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked attention too; where a kernel (flash, flex) takes no dense mask, SDPA does the masked part."""
    calls: list[tuple[str, bool]] = []

    def spy_of(name: str) -> Callable:
        def spy(module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
            calls.append((name, args[2] is not None))
            return sdpa_attention_forward(module, query, *args, **kwargs)

        return spy

    for name in ("sdpa", "maskless_kernel"):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, spy_of(name))
    perceiver = make_perceiver(implementation="sdpa", perceiver_num_stages=1)
    reference = perceiver(noise(1, 3, 3, 16)).masks_queries_logits
    assert calls == [("sdpa", False), ("sdpa", True), ("sdpa", False)]
    calls.clear()
    for module in perceiver.modules():
        if isinstance(module, CrossAttention):
            module.config._attn_implementation = "maskless_kernel"
    torch.testing.assert_close(perceiver(noise(1, 3, 3, 16)).masks_queries_logits, reference)
    assert calls == [("maskless_kernel", False), ("sdpa", True), ("maskless_kernel", False)]


def test_every_weight_that_a_mask_and_a_class_need_gets_a_gradient() -> None:
    perceiver = make_perceiver()
    output = perceiver(torch.randn(2, 3, 3, 16, dtype=torch.float64))
    (output.masks_queries_logits.pow(2).sum() + output.class_queries_logits.pow(2).sum()).backward()
    without = [name for name, weight in perceiver.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []
