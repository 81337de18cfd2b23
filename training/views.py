"""What the frozen encoder and perceiver see of every training image, computed once for the later stages."""

from dataclasses import dataclass

import torch
from torch import nn

from modeling_medsight.loss_medsight import resize_masks
from modeling_medsight.modeling_medsight import MedSightForConditionalGeneration

from .data import Augmenter, ImageRecord, Sample, unaugmented


@dataclass
class View:
    """One look at one image: as the image processor places it, or augmented.

    Attributes:
        record: the image.
        patch_features: (h*w, d), I.
        region_embeddings: (N, d), Q_r.
        masks: (n, H, W) uint8 at the model's mask size, in the order of `record.targets`.
        queries: (n,) long, the region query matched to each mask, -1 where there were more masks than queries.
        codes: (n,) long, the code index m of each mask's region; set by the annotate step.
    """

    record: ImageRecord
    patch_features: torch.Tensor
    region_embeddings: torch.Tensor
    masks: torch.Tensor
    queries: torch.Tensor
    codes: torch.Tensor | None = None


@torch.no_grad()
def see(
    model: MedSightForConditionalGeneration,
    samples: list[Sample],
    normalise: nn.Module,
    augmenter: Augmenter | None = None,
    batch_size: int = 16,
) -> list[View]:
    """Run the frozen encoder and perceiver over samples, augmented once if an augmenter is given."""
    model.eval()
    config = model.config
    class_ids = {name: index for index, name in enumerate(config.mask_class_names)}
    views = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        pixels, masks = augmenter(batch) if augmenter else unaugmented(batch)
        masks = [resize_masks(mask, config.mask_size) for mask in masks]
        labels = [torch.tensor([class_ids.get(t, 0) for t in s.record.targets], dtype=torch.long) for s in batch]
        regions = model.get_region_features(normalise(pixels))
        pairs = model.perceiver_loss.matcher(regions.masks_queries_logits, regions.class_queries_logits, masks, labels)
        for row, (sample, (found, target)) in enumerate(zip(batch, pairs, strict=True)):
            queries = torch.full((len(masks[row]),), -1, dtype=torch.long)
            queries[target] = found
            views.append(
                View(
                    record=sample.record,
                    patch_features=regions.patch_features[row].clone(),
                    region_embeddings=regions.region_embeddings[row].clone(),
                    masks=(masks[row] * 255).round().to(torch.uint8),
                    queries=queries,
                )
            )
    return views


@torch.no_grad()
def annotate(model: MedSightForConditionalGeneration, views: list[View]) -> None:
    """Give every mask its region code: matched region query -> to_code -> nearest code of the image's group."""
    model.eval()
    for view in views:
        group = torch.tensor([view.record.group])
        nearest = model.quantize_regions(view.region_embeddings[None], group).code_indices[0]
        view.codes = torch.where(view.queries >= 0, nearest[view.queries.clamp(min=0)], 0)
