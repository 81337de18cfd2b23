"""The modality-grouped region codebook: region embeddings to codes and back (paper, section 3)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput


@dataclass
class RegionQuantizerOutput(ModelOutput):
    """
    Args:
        code_indices (`torch.LongTensor` of shape `(batch, regions)`): m, index of the nearest code within the group.
        code_vectors (`torch.FloatTensor` of shape `(batch, regions, d_c)`): the l2-normalised nearest codes.
        reconstructed_regions (`torch.FloatTensor` of shape `(batch, regions, d)`): W_m(code).
        vq_loss (`torch.FloatTensor`, scalar, training only): codebook term + weighted commitment term.
        reconstruction_loss (`torch.FloatTensor`, scalar, training only): mean squared error of the reconstruction.
    """

    code_indices: torch.LongTensor | None = None
    code_vectors: torch.FloatTensor | None = None
    reconstructed_regions: torch.FloatTensor | None = None
    vq_loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None


class RegionCodebook(nn.Module):
    """K groups of M codes; groups share the maps to and from code space, never codes."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, code_dim = config.vision_hidden_size, config.code_dim
        self.commitment_weight = config.commitment_loss_weight
        self.to_code = nn.Sequential(
            nn.Linear(dim, dim),
            nn.GELU(),
            nn.LayerNorm(dim),
            nn.Linear(dim, code_dim),
            nn.GELU(),
            nn.LayerNorm(code_dim),
        )
        self.from_code = nn.Sequential(
            nn.Linear(code_dim, dim), nn.GELU(), nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim)
        )
        self.codes = nn.Parameter(torch.empty(config.num_groups, config.codes_per_group, code_dim))

    def encode(self, region_embeddings: torch.Tensor) -> torch.Tensor:
        """W_q: (..., d) -> (..., d_c), l2-normalised, float32."""
        return F.normalize(self.to_code(region_embeddings).float(), dim=-1)

    def decode(self, code_vectors: torch.Tensor) -> torch.Tensor:
        """W_m: (..., d_c) -> (..., d)."""
        return self.from_code(code_vectors.to(self.from_code[0].weight.dtype))

    def code_table(self) -> torch.Tensor:
        """All codes, l2-normalised, (K, M, d_c), float32."""
        return F.normalize(self.codes.float(), dim=-1)

    def forward(self, region_embeddings: torch.Tensor, groups: torch.Tensor) -> RegionQuantizerOutput:
        """Replace each region by the nearest code of its image's group.

        Args:
            region_embeddings: (batch, regions, d).
            groups: (batch,) long, the group k of each image.

        Raises:
            ValueError: if `groups` does not name one existing group for each image.
        """
        exists = torch.compiler.is_compiling() or bool(((groups >= 0) & (groups < len(self.codes))).all())
        if groups.shape != region_embeddings.shape[:1] or not exists:
            raise ValueError(
                f"groups {groups.tolist()} for {len(region_embeddings)} images: give each one between 0 and "
                f"{len(self.codes) - 1}"
            )
        vectors = self.encode(region_embeddings)
        codes = self.code_table()[groups.to(self.codes.device)].to(vectors.device)
        # Both are of unit length, so the nearest code is the one with the largest product; not a rounded one.
        with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
            indices = (vectors @ codes.transpose(1, 2)).argmax(dim=-1)
        nearest = torch.take_along_dim(codes, indices[..., None], dim=1)
        straight_through = vectors + (nearest - vectors).detach()
        reconstructed = self.decode(straight_through if self.training else nearest)
        vq_loss = reconstruction_loss = None
        if self.training:
            numbers = max(1, vectors.numel())  # there may be no regions
            to_regions = F.mse_loss(nearest, vectors.detach(), reduction="sum") / numbers
            to_codes = F.mse_loss(vectors, nearest.detach(), reduction="sum") / numbers
            vq_loss = to_regions + self.commitment_weight * to_codes
            error = F.mse_loss(reconstructed.float(), region_embeddings.detach().float(), reduction="sum")
            reconstruction_loss = error / max(1, region_embeddings.numel())
        return RegionQuantizerOutput(
            code_indices=indices,
            code_vectors=nearest,
            reconstructed_regions=reconstructed,
            vq_loss=vq_loss,
            reconstruction_loss=reconstruction_loss,
        )
