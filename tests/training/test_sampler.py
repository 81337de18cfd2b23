"""The order of training draws: a pure function of seed and epoch."""

from itertools import islice

import pytest
import torch

from medsight.training.sampler import DrawSampler, rarity_weights, with_replay


def rows(sampler: DrawSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return [draw % sampler.size for draw in sampler]


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_rows_come_in_passes_and_an_epoch_is_whole_steps(batch_size: int) -> None:
    sampler = DrawSampler(10, seed=1, batch_size=batch_size)
    drawn = [row for epoch in range(8) for row in rows(sampler, epoch)]
    assert len(sampler) % batch_size == 0
    for start in range(0, len(drawn) - 9, 10):
        assert sorted(drawn[start : start + 10]) == list(range(10))
    assert rows(sampler, 0) == rows(DrawSampler(10, seed=1, batch_size=batch_size), 0) != rows(sampler, 1)


def test_no_two_draws_of_a_run_are_the_same() -> None:
    sampler = DrawSampler(7, seed=0, weights=torch.tensor([0.5] + [0.1] * 6, dtype=torch.float64))
    draws = []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        draws += list(sampler)
    assert len(set(draws)) == len(draws) == 140
    assert 40 < sum(draw % 7 == 0 for draw in draws) < 100


def test_rows_are_drawn_by_weight_however_many_there_are() -> None:
    weights = torch.zeros(2**24 + 1, dtype=torch.float64)
    weights[[5, -1]] = 0.5
    draws = islice(DrawSampler(len(weights), seed=0, weights=weights), 50)
    assert {draw % len(weights) for draw in draws} == {5, len(weights) - 1}


def test_sets_of_one_target_are_drawn_by_their_size_to_a_power() -> None:
    names, targets = ["large"] * 9 + ["small"], [["a"]] * 10
    assert rarity_weights(names, targets, 1) is None
    even = rarity_weights(names, targets, 0)
    assert even[:9].sum() == pytest.approx(0.5) and even[9] == pytest.approx(0.5)
    root = rarity_weights(names, targets, 0.5)
    assert root[9] == pytest.approx(1 / 4)


def test_rows_with_rare_targets_are_drawn_more_often() -> None:
    weights = rarity_weights([None] * 5, [["liver"], ["liver", "rare"], ["liver", "liver"], ["liver"], []], 0)
    assert weights[1] == pytest.approx(4 * weights[0]) and weights[0] == weights[2] == weights[3]
    assert weights[4] == pytest.approx(weights[:4].mean())
    assert rarity_weights(["a", "b", "b"], [["x"], [], []], 0).tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 4])


@pytest.mark.parametrize("weights", [None, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)])
def test_replayed_sets_have_their_share_of_the_draws(weights: torch.Tensor | None) -> None:
    sets = ["new", "old", "old", "older"]
    chances = with_replay(weights, sets, {"old", "older"}, 0.25)
    assert chances[0].item() == pytest.approx(0.75) and chances.sum().item() == pytest.approx(1)
    before = torch.ones(4) if weights is None else weights
    assert torch.allclose(chances[1:] / chances[1], (before[1:] / before[1]).double())
    for replayed, share in (({"old"}, None), ((), 0.5), ({"new", "old", "older"}, 0.5)):
        assert with_replay(weights, sets, replayed, share) is weights
