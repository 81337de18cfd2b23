"""Region codes of masks: what a trained perceiver and codebook call them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from medsight.data.pictures import read_mask, read_picture
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
    queries = match_queries(model.config, regions, mask_labels, class_labels)
    with torch.no_grad():
        nearest = model.quantize_regions(regions.region_embeddings, groups.to(logits.device)).code_indices.cpu()
    return [nearest[i, query_of_mask] for i, query_of_mask in enumerate(queries)]


def match_queries(
    config: Any, regions: Any, mask_labels: Sequence[torch.Tensor], class_labels: Sequence[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """The region query of every mask, for each image (n_i,) long on the CPU: see `assign_codes`.

    Raises:
        ValueError: the model's mask logits are not finite.
    """
    logits, classes = regions.masks_queries_logits, regions.class_queries_logits
    if not torch.isfinite(logits).all():
        raise ValueError("the model's mask logits are not finite: its weights are damaged, or its precision too low")
    if class_labels is None:  # one class for all takes the class term out of the comparison
        class_labels = [torch.zeros(len(masks), dtype=torch.long) for masks in mask_labels]
        classes = torch.zeros_like(classes)
    targets = [resize_masks(masks.to(logits.device), tuple(logits.shape[-2:])) for masks in mask_labels]
    labels = [classes_of_image.to(logits.device) for classes_of_image in class_labels]
    found = []
    for i, (queries, matched) in enumerate(HungarianMatcher(config)(logits, classes, targets, labels)):
        query_of_mask = _overlaps(logits[i], targets[i]).argmax(0).cpu()
        query_of_mask[matched] = queries
        found.append(query_of_mask)
    return found


def place(row: Mapping[str, Any], processor: Any, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image (3, side, side) and its masks (n, side, side), one at least, on the model's canvas.

    Raises:
        OSError, ValueError: a picture is missing or bad, naming it.
    """
    picture = read_picture(row["image"])
    masks = np.stack([read_mask(entry, picture.size) for entry in row["masks"]])
    images = processor.image_processor
    pixels: torch.Tensor = images(images=picture, return_tensors="pt")["pixel_values"][0]
    return pixels, images.preprocess_masks(masks, output_size=(side, side))


def kmeans(points: torch.Tensor, count: int, rounds: int, generator: torch.Generator) -> torch.Tensor:
    """Centres (count, d) of unit-length points (n, d), themselves of unit length; n may be below count."""
    start = torch.randint(len(points), (count,), generator=generator)
    centres = points[start] + 1e-3 * torch.randn(count, points.shape[1], generator=generator)
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        for index in nearest.unique().tolist():
            centres[index] = F.normalize(points[nearest == index].mean(0), dim=0)
    return centres


def _overlaps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Soft Dice of every query (N, H, W) with every mask (n, H, W): (N, n)."""
    probabilities, targets = logits.float().sigmoid().flatten(1), targets.flatten(1)
    return 2 * probabilities @ targets.T / (probabilities.sum(1)[:, None] + targets.sum(1)[None] + 1e-6)
