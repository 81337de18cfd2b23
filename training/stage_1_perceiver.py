"""Stage 1: image encoder and region perceiver, on masks alone.

Two tasks share the perceiver. With its own region queries it finds regions, matched to the masks (the published task).
With a learnt embedding a class in their place it segments the classes asked for, with nothing to match. The second is
what decoding a region code will be, gives every query a target from the first step, and so learns many times faster.
The class embeddings serve in training only.
"""

from dataclasses import dataclass

import torch
from torch import nn

from modeling_medsight.loss_medsight import mask_bce, mask_dice, resize_masks
from modeling_medsight.modeling_medsight import MedSightForConditionalGeneration
from modeling_medsight.region_perceiver_medsight import RegionPerceiverOutput
from modeling_medsight.vision_medsight import encode_image

from .data import Augmenter, Sample, sampling_weights
from .optimisation import Optimisation, train_only


@dataclass(frozen=True)
class PerceiverStage:
    """Settings of stage 1.

    Attributes:
        steps, batch_size, learning_rate, muon_learning_rate, weight_decay, warmup: see `Optimisation`.
        set_power: sets are drawn in proportion to their size to this power.
        matching_share: share of the steps that also train the region queries by matching.
        auxiliary_weight: weight of the masks of every stage before the last.
        most_classes: most classes asked of an image at once.
    """

    steps: int
    batch_size: int = 8
    learning_rate: float = 1e-3
    muon_learning_rate: float = 3e-3
    weight_decay: float = 0.02
    warmup: int = 150
    set_power: float = 0.6
    matching_share: float = 0.34
    auxiliary_weight: float = 0.5
    most_classes: int = 8


def class_queries(embedding: nn.Embedding, asked: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Class ids a sample to padded queries (B, Q, d) and their mask (B, Q), true where a class is asked."""
    width = max(len(classes) for classes in asked)
    ids = torch.zeros(len(asked), width, dtype=torch.long)
    known = torch.zeros(len(asked), width, dtype=torch.bool)
    for row, classes in enumerate(asked):
        ids[row, : len(classes)] = torch.tensor(classes)
        known[row, : len(classes)] = True
    return embedding(ids), known


def draw_classes(count: int, most: int, generator: torch.Generator) -> list[int]:
    """A random subset of `count` masks, at least one and at most `most`, in random order."""
    number = int(torch.randint(1, min(most, count) + 1, (1,), generator=generator))
    return torch.randperm(count, generator=generator)[:number].tolist()


def train_perceiver(
    model: MedSightForConditionalGeneration,
    embedding: nn.Embedding,
    samples: list[Sample],
    augmenter: Augmenter,
    normalise: nn.Module,
    settings: PerceiverStage,
) -> None:
    """Train encoder, perceiver and `embedding`, the class queries (classes, d), in place."""
    config, perceiver = model.config, model.model.region_perceiver
    class_ids = {name: index for index, name in enumerate(config.mask_class_names)}
    samples = [sample for sample in samples if sample.record.masks]
    labels = [torch.tensor([class_ids[target] for target in sample.record.targets]) for sample in samples]
    weights = sampling_weights([sample.record for sample in samples], settings.set_power)
    parameters = train_only(model, ("model.vision_tower.", "model.region_perceiver."))
    perceiver.return_auxiliary_logits = True
    optimisation = Optimisation(
        "stage 1 perceiver",
        [*parameters, ("class_queries", embedding.weight)],
        settings.steps,
        settings.learning_rate,
        settings.muon_learning_rate,
        settings.weight_decay,
        settings.warmup,
    )
    generator = augmenter.generator
    for _ in range(settings.steps):
        drawn = torch.multinomial(weights, settings.batch_size, replacement=True, generator=generator).tolist()
        pixels, masks = augmenter([samples[index] for index in drawn])
        masks = [resize_masks(mask, config.mask_size) for mask in masks]
        pixel_values = normalise(pixels).contiguous(memory_format=torch.channels_last)
        grid = encode_image(model.model.vision_tower, pixel_values, config)[1]

        chosen = [draw_classes(len(labels[index]), settings.most_classes, generator) for index in drawn]
        queries, known = class_queries(embedding, [labels[i][c].tolist() for i, c in zip(drawn, chosen, strict=True)])
        output = perceiver(grid, queries=queries, query_mask=known)
        targets = torch.cat([mask[c] for mask, c in zip(masks, chosen, strict=True)])
        stages = [*(stage["masks_queries_logits"] for stage in output.auxiliary_logits), output.masks_queries_logits]
        losses = [_mask_loss(logits[known], targets) for logits in stages]
        conditioned = losses[-1] + settings.auxiliary_weight * sum(losses[:-1])
        parts = {"class_masks": losses[-1]}

        loss = conditioned
        if torch.rand(1, generator=generator).item() < settings.matching_share:
            matched = _matching_loss(
                model, perceiver(grid), masks, [labels[i] for i in drawn], settings.auxiliary_weight
            )
            parts["matching"] = matched
            loss = loss + matched
        optimisation.step(loss, **parts)
    perceiver.return_auxiliary_logits = config.auxiliary_loss


def _mask_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    targets = resize_masks(targets, tuple(logits.shape[-2:]))
    return (mask_bce(logits, targets) + mask_dice(logits, targets)).mean()


def _matching_loss(
    model: MedSightForConditionalGeneration,
    output: RegionPerceiverOutput,
    masks: list[torch.Tensor],
    labels: list[torch.Tensor],
    auxiliary_weight: float,
) -> torch.Tensor:
    """The perceiver's loss of the region queries; earlier stages keep the last one's pairs: a query has one target."""
    loss, pairs = model.perceiver_loss(output.masks_queries_logits, output.class_queries_logits, masks, labels)
    for stage in output.auxiliary_logits[1:]:
        earlier = model.perceiver_loss(
            stage["masks_queries_logits"], stage["class_queries_logits"], masks, labels, pairs
        )[0]
        loss = loss + auxiliary_weight * earlier
    return loss
