"""Losses and matcher against their formulas, written out a second time, slowly."""

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from configuration_medsight import MedSightConfig
from modeling_medsight.loss_medsight import (
    HungarianMatcher,
    RegionPerceiverLoss,
    code_mask_loss,
    mask_bce,
    mask_dice,
    resize_masks,
)

from .configurations import noise


def tiny(**overrides: Any) -> MedSightConfig:
    return MedSightConfig.from_preset("tiny", **overrides)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow_bce(logits: torch.Tensor, target: torch.Tensor) -> float:
    terms = [
        -g * math.log(sigmoid(x)) - (1 - g) * math.log(1 - sigmoid(x))
        for x, g in zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True)
    ]
    return sum(terms) / len(terms)


def slow_dice(logits: torch.Tensor, target: torch.Tensor) -> float:
    p, g = [sigmoid(x) for x in logits.flatten().tolist()], target.flatten().tolist()
    return 1 - (2 * sum(a * b for a, b in zip(p, g, strict=True)) + 1) / (sum(p) + sum(g) + 1)


def slow_cross_entropy(logits: torch.Tensor, classes: list[int], weights: list[float]) -> float:
    total = norm = 0.0
    for row, label in zip(logits.tolist(), classes, strict=True):
        total += weights[label] * (math.log(sum(math.exp(x) for x in row)) - row[label])
        norm += weights[label]
    return total / norm


@pytest.mark.parametrize("seed", range(3))
def test_mask_losses_are_their_formulas_mask_by_mask(seed: int) -> None:
    logits, target = 3 * noise(4, 3, 5, seed=seed), (noise(4, 3, 5, seed=seed + 9) > 0).float()
    assert mask_bce(logits, target).tolist() == pytest.approx(list(map(slow_bce, logits, target)), rel=1e-5)
    assert mask_dice(logits, target).tolist() == pytest.approx(list(map(slow_dice, logits, target)), rel=1e-5)


def test_a_shrunken_mask_holds_the_share_of_each_pixel_that_is_covered() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :, :2] = True
    small = resize_masks(mask, (4, 4))
    assert small.shape == (1, 4, 4) and small.dtype == torch.float32
    assert small.min() >= 0 and small.max() <= 1
    assert small[0, :, 0].min() > 0.8 and small[0, :, 2:].max() < 0.2
    assert small.sum().item() == pytest.approx(mask.sum().item() / 4, rel=0.1)
    assert torch.equal(resize_masks(mask, (8, 8)), mask.float())
    assert resize_masks(torch.zeros(0, 9, 7), (4, 4)).shape == (0, 4, 4)


def slow_cost(
    config: MedSightConfig, masks: torch.Tensor, classes: torch.Tensor, target: torch.Tensor, label: int
) -> float:
    return (
        config.bce_loss_weight * slow_bce(masks, target)
        + config.dice_loss_weight * slow_dice(masks, target)
        - config.class_loss_weight * classes.softmax(-1)[label].item()
    )


@pytest.mark.parametrize(("queries", "counts"), [(5, [3, 0, 5]), (3, [4, 2, 1])])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (5.0, 0.5, 2.0)])
def test_the_matcher_finds_the_cheapest_pairs_of_all(
    queries: int, counts: list[int], weights: tuple[float, float, float]
) -> None:
    config = tiny(bce_loss_weight=weights[0], dice_loss_weight=weights[1], class_loss_weight=weights[2])
    masks, classes = 2 * noise(3, queries, 4, 4), noise(3, queries, 8, seed=1)
    targets = [(noise(n, 4, 4, seed=n) > 0).float() for n in counts]
    labels = [torch.arange(n) % 7 for n in counts]
    pairs = HungarianMatcher(config)(masks, classes, targets, labels)
    for i, (n, (found, regions)) in enumerate(zip(counts, pairs, strict=True)):
        assert len(found) == len(regions) == min(queries, n)
        costs = [
            [slow_cost(config, masks[i, q], classes[i, q], targets[i][r], int(labels[i][r])) for r in range(n)]
            for q in range(queries)
        ]
        few, many = sorted((queries, n))
        rows = costs if queries <= n else list(zip(*costs, strict=True))
        best = min(sum(rows[at][to] for at, to in enumerate(chosen)) for chosen in permutations(range(many), few))
        given = sum(costs[q][r] for q, r in zip(found.tolist(), regions.tolist(), strict=True))
        assert given == pytest.approx(best, rel=1e-5, abs=1e-6)


def test_the_matcher_counts_in_full_precision_under_autocast() -> None:
    """Costs are differences of large sums: with products in bfloat16, as autocast makes them, other pairs come out."""
    matcher, different = HungarianMatcher(tiny(class_loss_weight=0.0)), 0
    for seed in range(20):
        masks, targets = 4 + noise(1, 6, 16, 16, seed=seed), [(noise(4, 16, 16, seed=seed + 50) > 0).float()]
        arguments = masks, noise(1, 6, 8, seed=1), targets, [torch.arange(4)]
        ((expected, _),) = matcher(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            ((given, _),) = matcher(*arguments)
            logits, wanted = masks[0].flatten(1).float(), targets[0].flatten(1).float()
            overlap, product = logits.sigmoid() @ wanted.T, logits @ wanted.T
        assert torch.equal(given, expected)
        bce = (torch.nn.functional.softplus(logits).sum(1)[:, None] - product) / 256
        dice = 1 - (2 * overlap + 1) / (logits.sigmoid().sum(1)[:, None] + wanted.sum(1)[None] + 1)
        different += linear_sum_assignment((bce + dice).numpy())[0].tolist() != expected.tolist()
    assert different > 0, "rounding would not have shown"


@pytest.mark.parametrize("counts", [(2, 1), (0, 3), (5, 6)])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 0.1), (2.0, 5.0, 0.5, 0.4)])
def test_the_perceiver_loss_is_its_formula(counts: tuple[int, int], weights: tuple[float, ...]) -> None:
    names = ("bce_loss_weight", "dice_loss_weight", "class_loss_weight", "no_object_weight")
    config = tiny(**dict(zip(names, weights, strict=True)))
    masks, classes = 2 * noise(2, 5, 4, 4), noise(2, 5, 8, seed=1)
    targets = [(noise(n, 4, 4, seed=n) > 0).float() for n in counts]
    labels = [torch.arange(n) % 7 for n in counts]
    loss, pairs = RegionPerceiverLoss(config)(masks, classes, targets, labels)

    chosen = [[7] * 5, [7] * 5]
    bce, dice = [], []
    for i, (query_index, region_index) in enumerate(pairs):
        for q, r in zip(query_index.tolist(), region_index.tolist(), strict=True):
            chosen[i][q] = int(labels[i][r])
            bce.append(slow_bce(masks[i, q], targets[i][r]))
            dice.append(slow_dice(masks[i, q], targets[i][r]))
    class_loss = slow_cross_entropy(classes.flatten(0, 1), chosen[0] + chosen[1], [1.0] * 7 + [weights[3]])
    expected = weights[2] * class_loss + (weights[0] * sum(bce) + weights[1] * sum(dice)) / len(bce)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_images_without_regions_only_teach_no_object() -> None:
    masks = noise(1, 3, 4, 4).requires_grad_()
    classes = noise(1, 3, 8, seed=1).requires_grad_()
    loss, _ = RegionPerceiverLoss(tiny())(masks, classes, [torch.zeros(0, 4, 4)], [torch.zeros(0, dtype=torch.long)])
    loss.backward()
    assert loss.item() == pytest.approx(slow_cross_entropy(classes[0], [7] * 3, [1.0] * 8), rel=1e-5)
    # In the graph all the same: data-parallel training need not search for unused parameters.
    assert masks.grad is not None and not masks.grad.any()
    silent = RegionPerceiverLoss(tiny(no_object_weight=0.0))
    assert silent(masks, classes, [torch.zeros(0, 4, 4)], [torch.zeros(0, dtype=torch.long)])[0].item() == 0


def test_given_pairs_are_used_instead_of_matching_anew() -> None:
    loss = RegionPerceiverLoss(tiny())
    masks, classes = 3 * noise(1, 4, 4, 4), noise(1, 4, 8, seed=1)
    targets, labels = [(noise(2, 4, 4, seed=2) > 0).float()], [torch.tensor([1, 2])]
    best, pairs = loss(masks, classes, targets, labels)
    swapped = [(pairs[0][0].flip(0), pairs[0][1])]
    other, used = loss(masks, classes, targets, labels, swapped)
    assert used is swapped and not torch.isclose(other, best)


def test_gradients_of_the_matched_loss_are_differences_of_the_loss() -> None:
    loss = RegionPerceiverLoss(tiny())
    arguments = noise(2, 5, 4, 4).requires_grad_(), noise(2, 5, 8, seed=1).requires_grad_()
    targets, labels = [(noise(n, 4, 4, seed=n) > 0).float() for n in (2, 1)], [torch.tensor([1, 4]), torch.tensor([0])]
    value, pairs = loss(*arguments, targets, labels)
    for tensor, gradient in zip(arguments, torch.autograd.grad(value, arguments), strict=True):
        direction = noise(*tensor.shape, seed=3)
        ends = [
            loss(*(t + step * direction if t is tensor else t for t in arguments), targets, labels, pairs)[0]
            for step in (1e-2, -1e-2)
        ]
        assert float((gradient * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-2, rel=0.01)


@pytest.mark.parametrize("counts", [(2, 0, 3), (1,), (0, 1)])
def test_the_loss_of_cited_masks_is_the_mean_over_masks_not_samples(counts: tuple[int, ...]) -> None:
    logits = [2 * noise(n, 4, 4, seed=n) for n in counts]
    targets = [noise(n, 4, 4, seed=n + 7) > 0 for n in counts]
    each = [
        slow_bce(x, g.float()) + slow_dice(x, g.float())
        for sample, masks in zip(logits, targets, strict=True)
        for x, g in zip(sample, masks, strict=True)
    ]
    assert code_mask_loss(logits, targets).item() == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_a_query_without_a_pair_may_be_of_a_class_that_nobody_looked_for() -> None:
    """What it says of such a class costs nothing; of any other class it costs as before."""
    config, generator = tiny(num_mask_classes=4), torch.Generator().manual_seed(0)
    masks, logits = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 5, generator=generator)
    targets = [torch.ones(1, 4, 4), torch.zeros(0, 4, 4)]
    labels = [torch.tensor([1]), torch.tensor([], dtype=torch.long)]
    loss = RegionPerceiverLoss(config)

    def of(unlabelled: list[list[bool]] | None, logits: torch.Tensor = logits) -> torch.Tensor:
        given = None if unlabelled is None else torch.tensor(unlabelled)
        return loss(masks, logits, targets, labels, unlabelled_classes=given)[0]

    nowhere, third = [[False] * 4] * 2, [[False, False, True, False]] * 2
    assert of(nowhere) == of(None)
    assert of([[True] * 4, [True] * 4]) < of(third) < of(None)
    known = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(of(third, known), known)
    alone = gradient[1]  # an image without a region: no query has a pair
    assert (alone[:, [0, 1, 3]] > 0).all() and (alone[:, [2, 4]] < 0).all()
    assert of([[True] * 4, [True] * 4], logits)[None].isfinite()
