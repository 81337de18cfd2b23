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
