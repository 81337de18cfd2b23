"""Mask losses, the Hungarian matcher and the perceiver's loss (architecture as in Mask2Former; paper, section 3)."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn


def mask_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy averaged over pixels, one value a mask: (n, ...), (n, ...) -> (n,), float32."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").flatten(1).mean(1)


def mask_dice(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Dice loss 1 - (2 Σpg + 1) / (Σp + Σg + 1) on sigmoids: (n, ...), (n, ...) -> (n,), float32."""
    probabilities, targets = logits.float().sigmoid().flatten(1), targets.float().flatten(1)
    overlap = (probabilities * targets).sum(1)
    return 1 - (2 * overlap + 1) / (probabilities.sum(1) + targets.sum(1) + 1)


def total(losses: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """Sum of the losses that there are, on the device of the first: parts of a model may be on several."""
    first, *others = [loss for loss in losses if loss is not None]
    return sum((loss.to(first.device) for loss in others), first)


def resize_masks(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Masks (n, H, W), boolean or in [0, 1], to (n, *size) float32, by bilinear interpolation with antialiasing."""
    masks = masks.float()
    if masks.shape[-2:] == tuple(size) or len(masks) == 0:
        return masks.reshape(len(masks), *size)
    return F.interpolate(masks[:, None], size=size, mode="bilinear", antialias=True)[:, 0].clamp(0, 1)


class HungarianMatcher(nn.Module):
    """Pairs region queries with regions at the least cost: mask BCE + Dice - class probability, weighted."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(
        self,
        masks_queries_logits: torch.Tensor,
        class_queries_logits: torch.Tensor,
        mask_labels: list[torch.Tensor],
        class_labels: list[torch.Tensor],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        Args:
            masks_queries_logits: (batch, queries, H, W).
            class_queries_logits: (batch, queries, classes + 1).
            mask_labels: a tensor (n_i, H, W) in [0, 1] a sample.
            class_labels: a tensor (n_i,) of class ids a sample.

        Returns:
            A pair (query indices, region indices) a sample, min(queries, n_i) long, on the CPU.
        """
        pairs = []
        for masks, classes, targets, labels in zip(
            masks_queries_logits, class_queries_logits, mask_labels, class_labels, strict=True
        ):
            logits, targets = masks.flatten(1).float(), targets.flatten(1).float()
            pixels = logits.shape[1]
            probabilities = logits.sigmoid()
            with torch.autocast(logits.device.type, enabled=False):  # costs are differences of large sums
                # BCE of every query with every region: softplus(x) - x * target, summed as one matrix product.
                bce = (F.softplus(logits).sum(1)[:, None] - logits @ targets.T) / pixels
                overlap = probabilities @ targets.T
            dice = 1 - (2 * overlap + 1) / (probabilities.sum(1)[:, None] + targets.sum(1)[None] + 1)
            likelihood = classes.float().softmax(-1)[:, labels]
            cost = self.config.bce_loss_weight * bce + self.config.dice_loss_weight * dice
            cost = cost - self.config.class_loss_weight * likelihood
            # Where logits are not finite any pairs will do: the loss says so.
            query_index, region_index = linear_sum_assignment(cost.nan_to_num().cpu().numpy())
            pairs.append((torch.as_tensor(query_index), torch.as_tensor(region_index)))
        return pairs


class RegionPerceiverLoss(nn.Module):
    """λ1 BCE + λ2 Dice over matched pairs, plus cross-entropy over all queries with a light 'no object' class."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.matcher = HungarianMatcher(config)

    def forward(
        self,
        masks_queries_logits: torch.Tensor,
        class_queries_logits: torch.Tensor,
        mask_labels: list[torch.Tensor],
        class_labels: list[torch.Tensor],
        pairs: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        loss_counts: dict[str, float] | None = None,
        unlabelled_classes: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Loss (scalar, float32) and the pairs used; arguments as for [`HungarianMatcher`], masks of any size.

        Args:
            pairs: take these instead of matching anew.
            loss_counts: `masks` that are matched and `images` to average over, where this call sees a part of a
                batch; its own by default.
            unlabelled_classes: (batch, classes) boolean, classes that nobody looked for in a sample: a query without a
                pair may as well be one of these as 'no object' (the marginal loss of Shi et al., 2021).
        """
        config, device, counts = self.config, masks_queries_logits.device, loss_counts or {}
        class_queries_logits = class_queries_logits.to(device)
        mask_labels = [resize_masks(masks.to(device), masks_queries_logits.shape[-2:]) for masks in mask_labels]
        class_labels = [labels.to(device) for labels in class_labels]
        if pairs is None:
            pairs = self.matcher(masks_queries_logits, class_queries_logits, mask_labels, class_labels)

        classes = torch.full(class_queries_logits.shape[:2], config.num_mask_classes, device=device)
        chosen_logits, chosen_targets = [], []
        for i, (queries, regions) in enumerate(pairs):
            queries, regions = queries.to(device), regions.to(device)
            classes[i, queries] = class_labels[i][regions]
            chosen_logits.append(masks_queries_logits[i, queries])
            chosen_targets.append(mask_labels[i][regions])
        logits, targets = torch.cat(chosen_logits), torch.cat(chosen_targets)
        num_masks = counts.get("masks", len(logits))
        num_queries = classes.shape[1] * counts.get("images", len(classes))
        weights = torch.ones(config.num_mask_classes + 1, device=device)
        weights[-1] = config.no_object_weight
        likelihood = class_queries_logits.float().log_softmax(-1)
        if unlabelled_classes is not None:
            may_be = F.pad(unlabelled_classes.to(device), (0, 1), value=True)[:, None]
            nothing = likelihood.masked_fill(~may_be, -torch.inf).logsumexp(-1, keepdim=True)
            likelihood = torch.cat((likelihood[..., :-1], nothing), dim=-1)
        class_loss = F.nll_loss(likelihood.transpose(1, 2), classes, weight=weights, reduction="sum")
        weight = num_masks + config.no_object_weight * (num_queries - num_masks)
        loss = config.class_loss_weight * class_loss / (weight or 1)  # without any weight there is no loss
        mask_loss = config.bce_loss_weight * mask_bce(logits, targets)
        mask_loss = mask_loss + config.dice_loss_weight * mask_dice(logits, targets)
        return loss + mask_loss.sum() / max(1, num_masks), pairs


def code_mask_loss(
    mask_logits: list[torch.Tensor], mask_labels: list[torch.Tensor], num_masks: float | None = None
) -> torch.Tensor:
    """BCE + Dice of decoded codes, mask i the target of code i, averaged over all real masks of the batch.

    Args:
        mask_logits: a tensor (codes, H, W) a sample.
        mask_labels: a tensor (codes, h, w) in [0, 1] a sample, of any size.
        num_masks: masks to average over, where this call sees a part of a batch; its own by default.
    """
    logits = torch.cat(mask_logits)
    targets = torch.cat([resize_masks(masks.to(logits.device), logits.shape[-2:]) for masks in mask_labels])
    losses = mask_bce(logits, targets) + mask_dice(logits, targets)
    return losses.sum() / max(1, len(losses) if num_masks is None else num_masks)


def masks_of_classes(masks: torch.Tensor, classes: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """The masks (a, H, W) of asked classes (a,), from an image's masks (n, H, W) and their classes (n,): all of a
    class together, empty where it is not there."""
    if not len(masks):
        return torch.zeros(len(asked), *masks.shape[1:], device=masks.device)
    of_class = (asked[:, None] == classes)[:, :, None, None]
    return (masks.float() * of_class).amax(dim=1)  # no look at what is on a GPU, which would wait for it
