"""Bootstrap intervals: reproducible, of the right width, macro over groups, paired."""

import random
from typing import Any

import numpy as np
import pytest

from medsight.metrics.intervals import bootstrap_interval


SCORES = np.random.default_rng(0).random(400).tolist()


def test_the_interval_of_a_mean_is_about_the_normal_one() -> None:
    found = bootstrap_interval(SCORES, n=4000)
    half = 1.96 * np.std(SCORES) / np.sqrt(len(SCORES))
    assert found.value == pytest.approx(np.mean(SCORES))
    assert found.low == pytest.approx(found.value - half, abs=half / 8)
    assert found.high == pytest.approx(found.value + half, abs=half / 8)


def test_a_seed_fixes_the_interval() -> None:
    assert bootstrap_interval(SCORES, seed=1) == bootstrap_interval(SCORES, seed=1)
    assert bootstrap_interval(SCORES, seed=1) != bootstrap_interval(SCORES, seed=2)


@pytest.mark.parametrize(
    ("scores", "groups", "expected"),
    [
        ([1.0] * 90 + [0.0] * 10, ["CT"] * 90 + ["MR"] * 10, (0.5, 0.5, 0.5)),  # groups weigh alike
        ([0.0, 1.0, 0.6], ["CT", "CT", "X-ray"], (0.55, 0.3, 0.8)),  # a group of one row stays as it is
        ([0.5, 0.5], None, (0.5, 0.5, 0.5)),
        ([0.7], None, (0.7, None, None)),  # nothing can vary
        ([0.75, 0.25], ["CT", "MR"], (0.5, None, None)),
    ],
)
def test_intervals_by_hand(scores: list[float], groups: list[str] | None, expected: Any) -> None:
    assert bootstrap_interval(scores, groups) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "arguments", "message"),
    [
        ([], {}, "scores: .* got 0"),
        ([1.0], {"groups": ["a", "b"]}, "groups: .* got 2 for 1"),
        ([1.0, 0.0], {"units": ["a"]}, "units: .* got 1 for 2"),
    ],
)
def test_bad_input_is_refused(scores: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(scores, **arguments)


def slow_interval(scores: list[float], groups: list[str], units: list[str], n: int, seed: int) -> tuple[float, float]:
    """The interval of a macro mean, unit by unit and row by row."""
    draw, statistics = random.Random(seed), []
    rows: dict[str, dict[str, list[float]]] = {group: {} for group in groups}
    for score, group, unit in zip(scores, groups, units, strict=True):
        rows[group].setdefault(unit, []).append(score)
    for _ in range(n):
        means = []
        for by_unit in rows.values():
            drawn = draw.choices(list(by_unit.values()), k=len(by_unit))
            means.append(np.mean(np.concatenate(drawn)))
        statistics.append(np.mean(means))
    statistics.sort()
    return statistics[round(0.025 * n)], statistics[round(0.975 * n) - 1]


@pytest.mark.parametrize("macro", [False, True])
def test_units_are_drawn_with_all_their_rows(macro: bool) -> None:
    generator = np.random.default_rng(1)
    units, groups, scores = [], [], []
    for patient in range(24):
        level = generator.random()
        for _ in range(int(generator.integers(1, 9))):
            units.append(f"p{patient}")
            groups.append("CT" if macro and patient % 3 else "MRI")
            scores.append(0.8 * level + 0.2 * generator.random())
    chosen: dict[str, Any] = {"groups": groups} if macro else {}
    found = bootstrap_interval(scores, units=units, n=4000, **chosen)
    low, high = slow_interval(scores, groups, units, 2000, 0)
    half = (high - low) / 2
    assert found.low == pytest.approx(low, abs=0.1 * half) and found.high == pytest.approx(high, abs=0.1 * half)
    alone = bootstrap_interval(scores, n=4000, **chosen)
    assert alone.value == found.value
    assert alone.high - alone.low < 0.7 * (found.high - found.low)  # type: ignore[operator]


def test_one_row_a_unit_is_as_no_units_and_one_unit_does_not_vary() -> None:
    names = [str(index) for index in range(len(SCORES))]
    assert bootstrap_interval(SCORES, units=names) == bootstrap_interval(SCORES)
    assert bootstrap_interval(SCORES, units=["p"] * len(SCORES))[1:] == (None, None)
