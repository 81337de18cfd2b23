"""Stages of the kind `regions`: the region perceiver, on masks alone (and the image encoder with it, where nothing is
pretrained). Stage 1 of the paper.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn

from .collators import RegionCollator
from .dataset import RegionDataset
from .stage import Stage, StageSettings, batch_to, dice, ratio


@dataclass
class RegionSettings(StageSettings):
    """Settings of stages on regions.

    Attributes:
        trains: `region_perceiver`, and `image_encoder` where it is not pretrained.
        matched_share: with class queries, share of the images that train the region queries too; the others ask for
            classes alone, which costs half.
        most_asked: most classes that an image is asked for at once.
        coarse_size, coarse_share: side in pixels that images are scaled down to for that first share of the steps: a
            convolutional encoder learns most of what it knows at a fraction of the cost.
        recalled: most classes an image that nobody looked for in it, and that images of its group show by the
            checkpoint's region_codes.json: the masks that the model finds of them before the stage are learnt beside
            the others (distillation; Li and Hoiem, 2016). Needs class queries.
    """

    trains: list[str] = field(default_factory=lambda: ["region_perceiver"])
    matched_share: float = 1.0
    most_asked: int = 8
    coarse_size: int | None = None
    coarse_share: float = 0.0
    recalled: int = 0


class RegionStage(Stage):
    """Trains R by Hungarian-matched masks and classes; its own metrics are oracle-matched Dice and class accuracy.

    Example:

    ```python
    >>> from medsight.training.stage_regions import RegionSettings, RegionStage
    >>> RegionStage.check(RegionSettings(trains=["image_encoder", "region_perceiver"]), {})

    ```
    """

    kind, reads, Settings = "regions", "regions", RegionSettings
    parts = ("image_encoder", "region_perceiver")

    @classmethod
    def check(cls, settings: Any, arguments: dict[str, Any]) -> None:
        super().check(settings, arguments)
        size, share = settings.coarse_size, settings.coarse_share
        if bool(size) != bool(share) or not 0 <= share <= 1:
            raise ValueError(f"coarse_size={size} and coarse_share={share}: give both, the share between 0 and 1")
        if size and settings.recalled:
            raise ValueError(f"coarse_size={size} and recalled={settings.recalled}: give one of them")

    def dataset(self, rows: Any, training: bool, **common: Any) -> RegionDataset:
        settings = self.settings
        share, recalled = (settings.matched_share, settings.recalled) if training else (1.0, 0)
        asked = {"most_asked": settings.most_asked, "recalled": recalled}
        return RegionDataset(rows, self.canvas, matched_share=share, **asked, **common)

    def batch_of_zeros(self, size: int, regions: int) -> dict[str, Any]:
        batch = region_batch_of_zeros(self.config, size, regions)
        if self.config.use_class_queries:
            asked = min(self.settings.most_asked, self.config.num_mask_classes)
            batch["asked_classes"] = [torch.zeros(asked, dtype=torch.long)] * size
            batch["matched_images"] = torch.arange(max(1, math.ceil(size * self.settings.matched_share)))
        return batch

    def collator(self) -> RegionCollator:
        return RegionCollator(class_queries=self.config.use_class_queries)

    def prepare(self, model: nn.Module) -> nn.Module:
        model = super().prepare(model)
        if "image_encoder" in self.settings.trains:
            freeze_unread(model.model.vision_tower, self.config)
        if self.settings.recalled:
            if not self.config.use_class_queries or not any(self.canvas.known):
                raise ValueError(
                    f"recalled={self.settings.recalled} needs a checkpoint with class queries that says what its "
                    "codes stand for: run medsight codes on it"
                )
            self.teacher = copy.deepcopy(model.region_model).requires_grad_(False).eval()
        return model

    @torch.no_grad()
    def with_recalled(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with the masks that the model which the stage began with finds of its `recalled_classes`."""
        recalled = batch["recalled_classes"]
        regions = self.teacher.get_region_features(batch["pixel_values"], with_masks=False)
        labels: dict[str, list[torch.Tensor]] = {"mask_labels": [], "class_labels": []}
        for row, logits in enumerate(ask_classes(self.teacher, regions, recalled)):
            masks, found = logits.float().sigmoid(), (logits > 0).flatten(1).any(1)
            given = {"mask_labels": masks[found], "class_labels": recalled[row][found]}
            for name, values in labels.items():
                values.append(torch.cat((batch[name][row], given[name].to(batch[name][row]))))
        return {**{name: value for name, value in batch.items() if name != "recalled_classes"}, **labels}

    def before_forward(self, batch: dict[str, Any], progress: float) -> dict[str, Any]:
        if "recalled_classes" in batch:
            return self.with_recalled(batch)
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


def freeze_unread(encoder: nn.Module, config: Any) -> None:
    """Freeze what lies behind the hidden state of an image encoder that is read: processes wait for its gradients."""
    training = encoder.training
    pixels = torch.zeros(1, 3, config.image_size, config.image_size, device=encoder.device, dtype=encoder.dtype)
    outputs = encoder.eval()(pixels, output_hidden_states=True, return_dict=True)
    encoder.train(training)
    parameters = list(encoder.parameters())
    read = outputs.hidden_states[config.vision_feature_layer].sum()
    for parameter, gradient in zip(parameters, torch.autograd.grad(read, parameters, allow_unused=True), strict=True):
        parameter.requires_grad_(gradient is not None)


def region_batch_of_zeros(config: Any, size: int, regions: int) -> dict[str, Any]:
    """Images with masks, all of them zeros, as the model's forward takes them."""
    return {
        "pixel_values": torch.zeros(size, 3, config.image_size, config.image_size),
        "mask_labels": [torch.zeros(regions, *config.mask_size) for _ in range(size)],
        "class_labels": [torch.zeros(regions, dtype=torch.long) for _ in range(size)],
    }


def pairwise_dice(masks: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Dice of every boolean mask (q, H, W) with every target (n, H, W): (q, n)."""
    masks, targets = masks.flatten(1).float(), targets.flatten(1).float()
    return 2 * masks @ targets.T / (masks.sum(1)[:, None] + targets.sum(1)[None]).clamp(min=1)


def ask_classes(model: nn.Module, regions: Any, classes: list[torch.Tensor]) -> list[torch.Tensor]:
    """Mask logits (n_i, H, W) that the queries of the given classes (n_i,) find in each image."""
    perceiver, config = model.region_perceiver, model.config
    width = max(1, *map(len, classes))
    ids = torch.stack([torch.cat((asked, asked.new_zeros(width - len(asked)))) for asked in classes])
    known = (
        torch.arange(width, device=ids.device) < torch.tensor([len(s) for s in classes], device=ids.device)[:, None]
    )
    grid = regions.patch_features.unflatten(1, config.patch_grid)
    masks = perceiver(grid, queries=perceiver.class_queries[ids], query_mask=known).masks_queries_logits
    return [rows[: len(asked)] for rows, asked in zip(masks, classes, strict=True)]
