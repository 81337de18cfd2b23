"""The region perceiver: learnable region queries and an upsampled feature map that attend to each other (paper,
section 3)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

from .outputs_medsight import RegionPerceiverOutput


def sine_position_encoding(features: torch.Tensor) -> torch.Tensor:
    """2-D sine position encoding (height, width, d) of a map (batch, height, width, d): d/2 features for y, then d/2
    for x.

    Coordinates count from 1 and are divided by (the last + 1e-6) times 2π; temperature 10000; sin on even features,
    cos on odd.
    """
    height, width, dim = features.shape[1:]
    half, device = dim // 2, features.device
    frequency = 10000 ** (2 * (torch.arange(half, device=device) // 2).float() / half)

    def one_axis(length: int) -> torch.Tensor:
        position = torch.arange(1, length + 1, device=device, dtype=torch.float32) / (length + 1e-6) * (2 * math.pi)
        angle = position[:, None] / frequency
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=-1).flatten(1).to(features.dtype)

    rows = one_axis(height)[:, None].expand(height, width, half)
    columns = one_axis(width)[None].expand(height, width, half)
    return torch.cat((rows, columns), dim=-1)


class CrossAttention(nn.Module):
    """Cross-attention with a LayerNorm on each side and linear maps without biases."""

    is_causal = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, inner = config.vision_hidden_size, config.perceiver_num_heads * config.perceiver_head_dim
        self.config = config
        self.head_dim = config.perceiver_head_dim
        self.scaling = self.head_dim**-0.5
        self.norm_queries = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor, visible: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`hidden_states` (batch, n, d) attend to `context` (batch, m, d) where `visible` (batch, n or 1, m) is true.

        A row that sees nothing attends uniformly.
        """
        query = self._split_heads(self.to_q(self.norm_queries(hidden_states)))
        key, value = (self._split_heads(part) for part in self.to_kv(self.norm_context(context)).chunk(2, dim=-1))

        mask = None
        if visible is not None:
            # Equal scores make attention uniform in every backend, where a row of very negative ones would not.
            sees_any = visible.any(dim=-1, keepdim=True)
            query = query * sees_any[:, None]
            hidden = ~(visible | ~sees_any)[:, None]
            mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, torch.finfo(query.dtype).min)

        implementation = self.config._attn_implementation
        if mask is not None and implementation not in ("eager", "sdpa"):
            implementation = "sdpa"  # flash and flex kernels take no dense mask
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, _ = attend(self, query, key, value, mask, scaling=self.scaling, dropout=0.0)
        return self.to_out(output.flatten(2))

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class AttentionBlock(nn.Module):
    """Cross-attention, residual, LayerNorm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention = CrossAttention(config)
        self.norm = nn.LayerNorm(config.vision_hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor, visible: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.norm(hidden_states + self.attention(hidden_states, context, visible))


class FeedForwardBlock(nn.Module):
    """LayerNorm, Linear, GELU, Linear, residual, LayerNorm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim = config.vision_hidden_size
        self.norm_in = nn.LayerNorm(dim)
        self.linear_1 = nn.Linear(dim, dim * config.perceiver_ffn_multiplier, bias=False)
        self.linear_2 = nn.Linear(dim * config.perceiver_ffn_multiplier, dim, bias=False)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm_out(hidden_states + self.linear_2(F.gelu(self.linear_1(self.norm_in(hidden_states)))))


class SegmentationHead(nn.Module):
    """Mask logits as the product of projected queries and the map; class logits from the queries themselves."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.mask_logits_scale = config.mask_logits_scale
        self.mask_projection = nn.Linear(config.vision_hidden_size, config.vision_hidden_size)
        self.class_predictor = nn.Linear(config.vision_hidden_size, config.num_mask_classes + 1)

    def forward(self, queries: torch.Tensor, image_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """queries (batch, n, d), map (batch, H, W, d) -> masks (batch, n, H, W), classes (batch, n, classes + 1)."""
        height, width = image_features.shape[1:3]
        masks = self.project(queries) @ image_features.flatten(1, 2).transpose(1, 2)
        return masks.unflatten(-1, (height, width)), self.class_predictor(queries)

    def project(self, queries: torch.Tensor) -> torch.Tensor:
        """What a map is multiplied by to give mask logits."""
        return self.mask_projection(queries) * self.mask_logits_scale


class RegionPerceiverStage(GradientCheckpointingLayer):
    """Upsampling with a convolution (ConvAdapter), then two-way cross-attention between queries and map."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim = config.vision_hidden_size
        self.adapter = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.region_to_image = AttentionBlock(config)
        self.region_feed_forward = FeedForwardBlock(config)
        self.image_to_region = AttentionBlock(config)
        self.image_feed_forward = FeedForwardBlock(config)

    def forward(
        self,
        queries: torch.Tensor,
        image_features: torch.Tensor,
        previous_masks: torch.Tensor,
        query_mask: torch.Tensor | None = None,
        upsampled_features: torch.Tensor | None = None,
        update_map: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Queries and map of this stage (none without `update_map`), and its map before any query touched it, which is
        made of `image_features` unless it is given."""
        if upsampled_features is None:
            upsampled = F.interpolate(image_features.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear")
            upsampled = self.adapter(upsampled).permute(0, 2, 3, 1)
            upsampled_features = upsampled + sine_position_encoding(upsampled)

        visible = F.interpolate(previous_masks.detach().float(), scale_factor=2, mode="bilinear").sigmoid() >= 0.5
        pixels = upsampled_features.flatten(1, 2)
        queries = self.region_feed_forward(self.region_to_image(queries, pixels, visible.flatten(2)))
        if not update_map:
            return queries, None, upsampled_features
        known = None if query_mask is None else query_mask[:, None]
        pixels = self.image_feed_forward(self.image_to_region(pixels, queries, known))
        return queries, pixels.unflatten(1, upsampled_features.shape[1:3]), upsampled_features


class RegionPerceiver(nn.Module):
    """Refines a grid of patch features to region embeddings and masks.

    The same module serves twice: with its own learnable queries it finds regions, with queries made from region codes
    it decodes their masks.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.return_auxiliary_logits = config.auxiliary_loss
        self.region_queries = nn.Parameter(torch.empty(1, config.num_region_queries, config.vision_hidden_size))
        self.class_queries = None
        if config.use_class_queries:
            self.class_queries = nn.Parameter(torch.empty(config.num_mask_classes, config.vision_hidden_size))
        self.initial_attention = AttentionBlock(config)
        self.initial_feed_forward = FeedForwardBlock(config)
        self.stages = nn.ModuleList(RegionPerceiverStage(config) for _ in range(config.perceiver_num_stages))
        self.segmentation_head = SegmentationHead(config)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype; what comes in is cast to it."""
        return self.region_queries.dtype

    def forward(
        self,
        patch_features: torch.Tensor,
        queries: torch.Tensor | None = None,
        query_mask: torch.Tensor | None = None,
        upsampled_features: torch.Tensor | None = None,
        with_masks: bool = True,
    ) -> RegionPerceiverOutput:
        """
        Args:
            patch_features: (batch, h, w, d), a grid of encoder features.
            queries: (batch, n, d), what to ask for; the learnable region queries by default.
            query_mask: (batch, n), false at queries that only pad a batch.
            upsampled_features: (batch, 2h, 2w, d), what an earlier pass over the same patches gave under this name.
            with_masks: false leaves out what only the last masks and classes need: these, and the last map.
        """
        patch_features = patch_features.to(self.dtype)
        features = patch_features + sine_position_encoding(patch_features)
        if queries is None:
            queries = self.region_queries.expand(patch_features.shape[0], -1, -1)
        queries = self.initial_feed_forward(self.initial_attention(queries, features.flatten(1, 2)))
        logits: list[tuple[torch.Tensor | None, torch.Tensor | None]] = [self.segmentation_head(queries, features)]
        for number, stage in enumerate(self.stages):
            update_map = with_masks or number < len(self.stages) - 1
            given = upsampled_features if number == 0 else None
            queries, features, upsampled = stage(queries, features, logits[-1][0], query_mask, given, update_map)
            upsampled_features = upsampled if number == 0 else upsampled_features
            logits.append(self.segmentation_head(queries, features) if update_map else (None, None))
        *auxiliary, (masks, classes) = logits
        return RegionPerceiverOutput(
            region_embeddings=queries,
            image_features=features,
            masks_queries_logits=masks,
            class_queries_logits=classes,
            auxiliary_logits=[{"masks_queries_logits": m, "class_queries_logits": c} for m, c in auxiliary]
            if self.return_auxiliary_logits
            else None,
            upsampled_features=upsampled_features,
        )
