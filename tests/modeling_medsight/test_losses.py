"""Losses and matcher against numbers worked by hand and formulas written out a second time, slowly."""

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


LARGE = 100.0


def tiny(**overrides: Any) -> MedSightConfig:
    return MedSightConfig.from_preset("tiny", **overrides)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def test_mask_losses_by_hand() -> None:
    target = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    undecided = torch.zeros(1, 2, 2)
    assert mask_bce(undecided, target).item() == pytest.approx(math.log(2))
    assert mask_dice(undecided, target).item() == pytest.approx(1 - (2 * 0.5 + 1) / (4 * 0.5 + 1 + 1))
    right = torch.where(target.bool(), LARGE, -LARGE)
    assert mask_bce(right, target).item() == pytest.approx(0)
    assert mask_dice(right, target).item() == pytest.approx(0)
    assert mask_bce(-right, target).item() == pytest.approx(LARGE)
    assert mask_dice(-right, target).item() == pytest.approx(1 - 1 / (3 + 1 + 1))
    empty = torch.zeros(1, 2, 2)
    assert mask_dice(torch.full((1, 2, 2), -LARGE), empty).item() == pytest.approx(0)


@pytest.mark.parametrize("seed", range(3))
def test_mask_losses_are_their_formulas_mask_by_mask(seed: int) -> None:
    logits, target = 3 * some(4, 3, 5, seed=seed), (some(4, 3, 5, seed=seed + 9) > 0).float()
    assert mask_bce(logits, target).tolist() == pytest.approx(list(map(slow_bce, logits, target)), rel=1e-5)
    assert mask_dice(logits, target).tolist() == pytest.approx(list(map(slow_dice, logits, target)), rel=1e-5)


def test_half_precision_losses_are_computed_in_float32() -> None:
    logits, target = 3 * some(2, 8, 8), some(2, 8, 8, seed=1) > 0
    for loss in (mask_bce, mask_dice):
        given = loss(logits.bfloat16(), target)
        assert given.dtype == torch.float32
        torch.testing.assert_close(given, loss(logits.bfloat16().float(), target.float()))


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


@pytest.mark.parametrize(("queries", "regions"), [(5, 3), (3, 3), (3, 4), (2, 0)])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (5.0, 0.5, 2.0)])
def test_the_matcher_finds_the_cheapest_pairs_of_all(
    queries: int, regions: int, weights: tuple[float, float, float]
) -> None:
    config = tiny(bce_loss_weight=weights[0], dice_loss_weight=weights[1], class_loss_weight=weights[2])
    masks, classes = 2 * some(1, queries, 4, 4), some(1, queries, 8, seed=1)
    targets = (some(regions, 4, 4, seed=2) > 0).float()
    labels = torch.arange(regions) % 7
    ((query_index, region_index),) = HungarianMatcher(config)(masks, classes, [targets], [labels])
    assert len(query_index) == len(region_index) == min(queries, regions)

    def cost_of(pairs: list[tuple[int, int]]) -> float:
        return sum(slow_cost(config, masks[0, q], classes[0, q], targets[r], int(labels[r])) for q, r in pairs)

    if queries >= regions:
        every = [list(zip(chosen, range(regions), strict=True)) for chosen in permutations(range(queries), regions)]
    else:
        every = [list(zip(range(queries), chosen, strict=True)) for chosen in permutations(range(regions), queries)]
    best = min(map(cost_of, every))
    given = cost_of(list(zip(query_index.tolist(), region_index.tolist(), strict=True)))
    assert given == pytest.approx(best, rel=1e-5, abs=1e-6)


def test_the_matcher_counts_in_full_precision_under_autocast() -> None:
    """Costs are differences of large sums: in bfloat16 another pair would come out."""
    matcher = HungarianMatcher(tiny(class_loss_weight=0.0))
    different = 0
    for seed in range(20):
        masks, targets = 2 * some(1, 6, 16, 16, seed=seed), [(some(4, 16, 16, seed=seed + 50) > 0).float()]
        arguments = masks, some(1, 6, 8, seed=1), targets, [torch.arange(4)]
        ((expected, _),) = matcher(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            ((given, _),) = matcher(*arguments)
        assert torch.equal(given, expected)
        logits, wanted = masks[0].flatten(1).bfloat16(), targets[0].flatten(1).bfloat16()
        overlap = logits.sigmoid() @ wanted.T
        bce = (torch.nn.functional.softplus(logits).sum(1)[:, None] - logits @ wanted.T) / 256
        dice = 1 - (2 * overlap + 1) / (logits.sigmoid().sum(1)[:, None] + wanted.sum(1)[None] + 1)
        rounded = linear_sum_assignment((bce + dice).float().numpy())[0]
        different += rounded.tolist() != expected.tolist()
    assert different > 0, "rounding would not have shown"


def test_samples_are_matched_each_for_itself_whatever_their_number_of_regions() -> None:
    masks, classes = some(3, 5, 4, 4), some(3, 5, 8, seed=1)
    targets = [(some(n, 4, 4, seed=n) > 0).float() for n in (0, 5, 2)]
    labels = [torch.arange(n) for n in (0, 5, 2)]
    matcher = HungarianMatcher(tiny())
    together = matcher(masks, classes, targets, labels)
    for i in range(3):
        (alone,) = matcher(masks[i : i + 1], classes[i : i + 1], targets[i : i + 1], labels[i : i + 1])
        assert all(torch.equal(a, b) for a, b in zip(together[i], alone, strict=True))


@pytest.mark.parametrize("counts", [(2, 1), (0, 3), (5, 6)])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 0.1), (2.0, 5.0, 0.5, 0.4)])
def test_the_perceiver_loss_is_its_formula(counts: tuple[int, int], weights: tuple[float, ...]) -> None:
    names = ("bce_loss_weight", "dice_loss_weight", "class_loss_weight", "no_object_weight")
    config = tiny(**dict(zip(names, weights, strict=True)))
    masks, classes = 2 * some(2, 5, 4, 4), some(2, 5, 8, seed=1)
    targets = [(some(n, 4, 4, seed=n) > 0).float() for n in counts]
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


def test_the_perceiver_loss_by_hand() -> None:
    """One query, undecided about mask and class: ln 2 for the mask, Dice, and ln 2 for two classes, both weights 1."""
    config = tiny(num_mask_classes=1, no_object_weight=1.0)
    target = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    loss, _ = RegionPerceiverLoss(config)(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2), [target], [torch.tensor([0])])
    assert loss.item() == pytest.approx(math.log(2) + (1 - (2 * 1 + 1) / (2 + 2 + 1)) + math.log(2))


def test_images_without_regions_only_teach_no_object() -> None:
    masks = some(1, 3, 4, 4).requires_grad_()
    classes = some(1, 3, 8, seed=1).requires_grad_()
    loss, _ = RegionPerceiverLoss(tiny())(masks, classes, [torch.zeros(0, 4, 4)], [torch.zeros(0, dtype=torch.long)])
    loss.backward()
    assert loss.item() == pytest.approx(slow_cross_entropy(classes[0], [7] * 3, [1.0] * 8), rel=1e-5)
    # In the graph all the same: data-parallel training need not search for unused parameters.
    assert masks.grad is not None and not masks.grad.any()


def test_given_pairs_are_used_instead_of_matching_anew() -> None:
    loss = RegionPerceiverLoss(tiny())
    masks, classes = 3 * some(1, 4, 4, 4), some(1, 4, 8, seed=1)
    targets, labels = [(some(2, 4, 4, seed=2) > 0).float()], [torch.tensor([1, 2])]
    best, pairs = loss(masks, classes, targets, labels)
    again, _ = loss(masks, classes, targets, labels, pairs)
    assert torch.equal(best, again)
    swapped = [(pairs[0][0].flip(0), pairs[0][1])]
    other, used = loss(masks, classes, targets, labels, swapped)
    assert used is swapped and not torch.isclose(other, best)


def test_mask_labels_of_any_size_are_brought_to_the_masks() -> None:
    loss = RegionPerceiverLoss(tiny())
    masks, classes, labels = some(1, 3, 4, 4), some(1, 3, 8, seed=1), [torch.tensor([3, 4])]
    small = some(2, 4, 4, seed=2) > 0
    large = small.repeat_interleave(8, 1).repeat_interleave(8, 2)
    given, _ = loss(masks, classes, [large], labels)
    expected, _ = loss(masks, classes, [resize_masks(large, (4, 4))], labels)
    assert torch.equal(given, expected)
    near, _ = loss(masks, classes, [small], labels)
    torch.testing.assert_close(given, near, rtol=0.1, atol=0)


@pytest.mark.parametrize("counts", [(2, 0, 3), (1,), (0, 1)])
def test_the_loss_of_cited_masks_is_the_mean_over_masks_not_samples(counts: tuple[int, ...]) -> None:
    logits = [2 * some(n, 4, 4, seed=n) for n in counts]
    targets = [some(n, 4, 4, seed=n + 7) > 0 for n in counts]
    each = [
        slow_bce(x, g.float()) + slow_dice(x, g.float())
        for sample, masks in zip(logits, targets, strict=True)
        for x, g in zip(sample, masks, strict=True)
    ]
    assert code_mask_loss(logits, targets).item() == pytest.approx(sum(each) / len(each), rel=1e-5)
