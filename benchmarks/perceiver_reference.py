"""The region perceiver written down as its description reads, with einsum attention: slow and large, but plain.

The arithmetic is that of `modeling_medsight.region_perceiver_medsight`, on that module's own weights; nothing of its
code is used.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F


def position_encoding(height: int, width: int, dim: int) -> torch.Tensor:
    """2-D sine encoding (height, width, dim): y first, then x."""
    half = dim // 2
    frequency = 10000 ** (2 * (torch.arange(half) // 2) / half)
    axes = []
    for length in (height, width):
        angle = (torch.arange(1, length + 1) / (length + 1e-6) * 2 * math.pi)[:, None] / frequency
        axes.append(torch.where(torch.arange(half) % 2 == 0, angle.sin(), angle.cos()))
    rows = axes[0][:, None].expand(height, width, half)
    return torch.cat((rows, axes[1][None].expand(height, width, half)), dim=-1)


class Reference:
    """Args:
    weights: the state of a `RegionPerceiver`.
    heads: attention heads.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], heads: int) -> None:
        self.weights, self.heads = weights, heads
        self.stages = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("stages."))

    def __call__(self, grid: torch.Tensor, queries: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask logits (batch, n, H, W) and the map (batch, H, W, d) of a grid (batch, h, w, d)."""
        if queries is None:
            queries = self.weights["region_queries"].expand(len(grid), -1, -1)
        features = self.positioned(grid)
        queries = self.attend("initial_attention", queries, features.flatten(1, 2), None)
        queries = self.feed_forward("initial_feed_forward", queries)
        masks = self.segment(queries, features)
        for stage in range(self.stages):
            name = f"stages.{stage}"
            features = F.interpolate(features.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear")
            features = F.conv2d(
                features, self.weights[f"{name}.adapter.weight"], self.weights[f"{name}.adapter.bias"], padding=1
            )
            features = self.positioned(features.permute(0, 2, 3, 1))
            size = features.shape[1:3]
            hidden = F.interpolate(masks, scale_factor=2, mode="bilinear").sigmoid().flatten(2) < 0.5
            pixels = features.flatten(1, 2)
            queries = self.attend(f"{name}.region_to_image", queries, pixels, hidden)
            queries = self.feed_forward(f"{name}.region_feed_forward", queries)
            pixels = self.attend(f"{name}.image_to_region", pixels, queries, None)
            features = self.feed_forward(f"{name}.image_feed_forward", pixels).unflatten(1, size)
            masks = self.segment(queries, features)
        return masks, features

    def positioned(self, features: torch.Tensor) -> torch.Tensor:
        return features + position_encoding(*features.shape[1:]).to(features)

    def norm(self, name: str, states: torch.Tensor) -> torch.Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.layer_norm(states, weight.shape, weight, self.weights[f"{name}.bias"])

    def attend(
        self, name: str, states: torch.Tensor, context: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """Cross-attention, residual, norm; `hidden` (batch, n, m) is true where nothing is seen."""
        inner = f"{name}.attention"
        normed = self.norm(f"{inner}.norm_context", context)
        query = self.norm(f"{inner}.norm_queries", states) @ self.weights[f"{inner}.to_q.weight"].T
        key, value = (normed @ self.weights[f"{inner}.to_kv.weight"].T).chunk(2, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in (query, key, value))
        scores = torch.einsum("bnhd,bmhd->bhnm", query, key) / math.sqrt(query.shape[-1])
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None].repeat(1, self.heads, 1, 1), -torch.finfo(scores.dtype).max)
        output = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value).flatten(2)
        return self.norm(f"{name}.norm", states + output @ self.weights[f"{inner}.to_out.weight"].T)

    def feed_forward(self, name: str, states: torch.Tensor) -> torch.Tensor:
        inner = F.gelu(self.norm(f"{name}.norm_in", states) @ self.weights[f"{name}.linear_1.weight"].T)
        return self.norm(f"{name}.norm_out", states + inner @ self.weights[f"{name}.linear_2.weight"].T)

    def segment(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        name = "segmentation_head.mask_projection"
        projected = queries @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
        return torch.einsum("bnd,bhwd->bnhw", projected, features)
