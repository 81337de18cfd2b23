"""Bootstrap intervals: reproducible, of the right width, macro over groups, paired."""

from typing import Any

import numpy as np
import pytest

from medsight.metrics.intervals import bootstrap_interval, paired_difference


SCORES = np.random.default_rng(0).random(400).tolist()


def test_the_interval_of_a_mean_is_about_the_normal_one() -> None:
    found = bootstrap_interval(SCORES, n=4000)
    half = 1.96 * np.std(SCORES) / np.sqrt(len(SCORES))
    assert found.value == pytest.approx(np.mean(SCORES))
    assert found.low == pytest.approx(found.value - half, abs=half / 8)
    assert found.high == pytest.approx(found.value + half, abs=half / 8)


def test_a_seed_fixes_the_interval_and_a_level_widens_it() -> None:
    assert bootstrap_interval(SCORES, seed=1) == bootstrap_interval(SCORES, seed=1)
    assert bootstrap_interval(SCORES, seed=1) != bootstrap_interval(SCORES, seed=2)
    wide, narrow = bootstrap_interval(SCORES, level=0.99), bootstrap_interval(SCORES, level=0.8)
    assert wide.low < narrow.low < narrow.high < wide.high  # type: ignore[operator]


def test_macro_weighs_groups_alike_and_resamples_within_them() -> None:
    scores, groups = [1.0] * 90 + [0.0] * 10, ["CT"] * 90 + ["MR"] * 10
    assert bootstrap_interval(scores, groups, "macro") == (0.5, 0.5, 0.5)
    assert bootstrap_interval(scores).value == pytest.approx(0.9)


def test_macro_takes_groups_of_one_row_as_they_are() -> None:
    found = bootstrap_interval([0.0, 1.0, 0.6], ["CT", "CT", "X-ray"], "macro")
    assert found == pytest.approx((0.55, 0.3, 0.8))


def test_nothing_that_varies_has_no_interval() -> None:
    assert bootstrap_interval([0.7]) == (0.7, None, None)
    assert bootstrap_interval([0.75, 0.25], ["CT", "MR"], "macro") == (0.5, None, None)
    assert bootstrap_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_paired_differences_forget_what_rows_have_in_common() -> None:
    better = [score + 0.1 for score in SCORES]
    assert paired_difference(better, SCORES) == pytest.approx((0.1, 0.1, 0.1))
    assert paired_difference(SCORES, SCORES) == (0.0, 0.0, 0.0)
    groups = ["CT", "MR"] * 200
    assert paired_difference(better, SCORES, groups, "macro").value == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("scores", "arguments", "message"),
    [
        ([], {}, "at least one score"),
        ([1.0, None], {}, "scores: 1 are no finite numbers, row 1 first"),
        ([float("nan")], {}, "no finite numbers"),
        ([1.0], {"statistic": "median"}, "choose one of mean, macro"),
        ([1.0], {"statistic": "macro"}, "groups: expected 1, as many as scores, got none"),
        ([1.0], {"statistic": "macro", "groups": ["a", "b"]}, "got 2"),
        ([1.0], {"n": 0}, "at least one resample"),
        ([1.0], {"level": 1.0}, "a level between 0 and 1"),
    ],
)
def test_bad_input_is_refused(scores: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(scores, **arguments)


def test_a_pair_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="the same rows, got 1 and 2"):
        paired_difference([1.0], [1.0, 0.0])


def slow_interval(scores: list[float], groups: list[str], units: list[str], n: int, seed: int) -> tuple[float, float]:
    """The interval of a macro mean, unit by unit and row by row."""
    import random

    draw, statistics = random.Random(seed), []
    for _ in range(n):
        means = []
        for group in sorted(set(groups)):
            own = sorted({unit for unit, other in zip(units, groups, strict=True) if other == group})
            taken = [draw.choice(own) for _ in own]
            rows = [
                score
                for one in taken
                for score, other, unit in zip(scores, groups, units, strict=True)
                if other == group and unit == one
            ]
            means.append(sum(rows) / len(rows))
        statistics.append(sum(means) / len(means))
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
    chosen: dict[str, Any] = {"groups": groups, "statistic": "macro"} if macro else {}
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
    better = [score + 0.1 for score in SCORES]
    assert paired_difference(better, SCORES, units=["a", "b"] * 200) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="units: expected 2, as many as scores, got 1"):
        bootstrap_interval([1.0, 0.0], units=["a"])
