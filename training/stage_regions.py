"""Stage 1: the region perceiver, on masks alone (and the image encoder with it, where nothing is pretrained).

medsight train CONFIG.yaml --stage perceiver
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn

from .collators import RegionCollator
from .items import Items, RegionItems
from .stage import Stage, StageSettings, batch_to, dice, ratio


@dataclass
class PerceiverSettings(StageSettings):
    """Settings of stage 1.

    Attributes:
        train_encoder: train the image encoder too.
        matched_share: with class queries, share of the images that train the region queries too; the others ask for
            classes alone, which costs half.
        most_asked: most classes that an image is asked for at once.
        coarse_size, coarse_share: side in pixels that images are scaled down to for that first share of the steps: a
            convolutional encoder learns most of what it knows at a fraction of the cost.
    """

    train_encoder: bool = False
    matched_share: float = 1.0
    most_asked: int = 8
    coarse_size: int | None = None
    coarse_share: float = 0.0

    def __post_init__(self) -> None:
        if bool(self.coarse_size) != bool(self.coarse_share) or not 0 <= self.coarse_share <= 1:
            raise ValueError(
                f"stages.perceiver: coarse_size={self.coarse_size} and coarse_share={self.coarse_share}: give both, "
                "the share between 0 and 1"
            )


class PerceiverStage(Stage):
    """Trains R by Hungarian-matched masks and classes; its own metrics are oracle-matched Dice and class accuracy."""

    key, folder, reads, Settings = "perceiver", "1_perceiver", "regions", PerceiverSettings

    def trains(self) -> tuple[str, ...]:
        encoder = ("model.vision_tower.",) if self.settings.train_encoder else ()
        return (*encoder, "model.region_perceiver.")

    def items(self, rows: Any, training: bool, **common: Any) -> Items:
        share = self.settings.matched_share if training else 1.0
        return RegionItems(rows, self.places, most_asked=self.settings.most_asked, matched_share=share, **common)

    def collator(self) -> RegionCollator:
        return RegionCollator(class_queries=self.config.use_class_queries)

    def before_forward(self, batch: dict[str, Any], progress: float) -> dict[str, Any]:
        if progress >= self.settings.coarse_share:
            return batch
        size = (self.settings.coarse_size,) * 2
        pixels = F.interpolate(batch["pixel_values"], size, mode="bilinear", antialias=True)
        return {**batch, "pixel_values": pixels}

    def score(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        regions = model.get_region_features(batch["pixel_values"])
        result = {"dice": 0.0, "right": 0.0, "masks": 0.0, "class_dice": 0.0}
        for row, (targets, classes) in enumerate(zip(batch["mask_labels"], batch["class_labels"], strict=True)):
            if not len(targets):
                continue
            targets = targets >= 0.5
            pairs = pairwise_dice(regions.masks_queries_logits[row] > 0, targets)
            queries, wanted = linear_sum_assignment(-pairs.cpu().numpy())
            predicted = regions.class_queries_logits[row][queries].argmax(-1)
            result["dice"] += float(pairs[queries, wanted].sum())
            result["right"] += float((predicted == classes[wanted]).sum())
            result["masks"] += len(targets)
        if self.config.use_class_queries:
            for masks, targets in zip(
                ask_classes(model, regions, batch["class_labels"]), batch["mask_labels"], strict=True
            ):
                result["class_dice"] += float(dice(masks > 0, targets >= 0.5).sum())
        return result

    def summarise(self, totals: dict[str, torch.Tensor]) -> dict[str, float]:
        figures = {"dice": ratio(totals, "dice", "masks"), "class_accuracy": ratio(totals, "right", "masks")}
        if self.config.use_class_queries:
            figures["class_query_dice"] = ratio(totals, "class_dice", "masks")
        return figures

    def example(self, model: nn.Module, sample: dict[str, Any]) -> tuple[list[torch.Tensor], list[str]]:
        batch = batch_to(self.collator()([sample]), model.device)
        regions = model.get_region_features(batch["pixel_values"])
        logits = regions.class_queries_logits[0].softmax(-1)
        found = [i for i in range(len(logits)) if int(logits[i].argmax()) != self.config.num_mask_classes]
        names = self.config.mask_class_names or [f"class {i}" for i in range(self.config.num_mask_classes)]
        masks = [regions.masks_queries_logits[0][i] > 0 for i in found]
        return masks, [f"{names[int(logits[i].argmax())]} {float(logits[i].max()):.2f}" for i in found]


def pairwise_dice(masks: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Dice of every boolean mask (q, H, W) with every target (n, H, W): (q, n)."""
    masks, targets = masks.flatten(1).float(), targets.flatten(1).float()
    return 2 * masks @ targets.T / (masks.sum(1)[:, None] + targets.sum(1)[None]).clamp(min=1)


def ask_classes(model: nn.Module, regions: Any, classes: list[torch.Tensor]) -> list[torch.Tensor]:
    """Mask logits (n_i, H, W) that the queries of the given classes (n_i,) find in each image."""
    perceiver, config = model.model.region_perceiver, model.config
    width = max(1, *(len(some) for some in classes))
    ids = torch.stack([torch.cat((some, some.new_zeros(width - len(some)))) for some in classes])
    known = (
        torch.arange(width, device=ids.device) < torch.tensor([len(s) for s in classes], device=ids.device)[:, None]
    )
    grid = regions.patch_features.unflatten(1, config.patch_grid)
    masks = perceiver(grid, queries=perceiver.class_queries[ids], query_mask=known).masks_queries_logits
    return [rows[: len(some)] for rows, some in zip(masks, classes, strict=True)]
