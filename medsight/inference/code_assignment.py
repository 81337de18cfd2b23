"""Region codes of masks: what a trained perceiver and codebook call them."""

from collections.abc import Sequence
from typing import Any

import torch

from modeling_medsight.loss_medsight import HungarianMatcher, resize_masks


def assign_codes(
    model: Any,
    regions: Any,
    mask_labels: Sequence[torch.Tensor],
    class_labels: Sequence[torch.Tensor] | None,
    groups: torch.Tensor,
) -> list[torch.Tensor]:
    """The region code of every mask: of the region query that the model's own matcher pairs it with, the nearest code.

    A mask beyond the number of queries gets the code of the query whose mask overlaps it most (by Dice).

    Args:
        model: a `MedSightForConditionalGeneration`.
        regions: its `get_region_features` of the images.
        mask_labels: for each image (n_i, H, W), boolean or in [0, 1], of any size.
        class_labels: for each image (n_i,), classes of the masks; `None` matches by masks alone.
        groups: (images,) long, the code group k of each image.

    Returns:
        For each image (n_i,) long: m, the index of the code within its group, on the CPU. Without a codebook all 0.

    Raises:
        ValueError: the model's mask logits are not finite, or counts differ.
    """
    logits = regions.masks_queries_logits
    given = mask_labels if class_labels is None else class_labels
    if not len(logits) == len(mask_labels) == len(groups) or list(map(len, given)) != list(map(len, mask_labels)):
        raise ValueError(
            f"{len(logits)} images, {len(mask_labels)} mask_labels, {len(groups)} groups: expected an entry an image, "
            "and a class a mask"
        )
    if not model.config.use_region_codebook:
        return [torch.zeros(len(masks), dtype=torch.long) for masks in mask_labels]
    if not torch.isfinite(logits).all():
        raise ValueError("the model's mask logits are not finite: its weights are damaged, or its precision too low")
    classes = regions.class_queries_logits
    if class_labels is None:  # one class for all takes the class term out of the comparison
        class_labels = [torch.zeros(len(masks), dtype=torch.long) for masks in mask_labels]
        classes = torch.zeros_like(classes)
    targets = [resize_masks(masks.to(logits.device), tuple(logits.shape[-2:])) for masks in mask_labels]
    labels = [classes_of_image.to(logits.device) for classes_of_image in class_labels]
    with torch.no_grad():
        pairs = HungarianMatcher(model.config)(logits, classes, targets, labels)
        nearest = model.quantize_regions(regions.region_embeddings, groups.to(logits.device)).code_indices.cpu()
    codes = []
    for i, (queries, matched) in enumerate(pairs):
        query_of_mask = _overlaps(logits[i], targets[i]).argmax(0).cpu()
        query_of_mask[matched] = queries
        codes.append(nearest[i, query_of_mask])
    return codes


def _overlaps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Soft Dice of every query (N, H, W) with every mask (n, H, W): (N, n)."""
    probabilities, targets = logits.float().sigmoid().flatten(1), targets.flatten(1)
    return 2 * probabilities @ targets.T / (probabilities.sum(1)[:, None] + targets.sum(1)[None] + 1e-6)
