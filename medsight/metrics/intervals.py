"""Bootstrap intervals of mean scores, and of differences between two systems over the same rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


STATISTICS = ("mean", "macro")


class Interval(NamedTuple):
    """A statistic and its interval.

    Attributes:
        value: of the scores themselves.
        low, high: ends of the interval; None where nothing varies between resamples because no group has two units.
    """

    value: float
    low: float | None
    high: float | None


def bootstrap_interval(
    scores: Sequence[float],
    groups: Sequence[str] | None = None,
    statistic: str = "mean",
    units: Sequence[str] | None = None,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap (Efron and Tibshirani, 1993, chapter 13) over units, such as patients.

    Units are drawn with replacement, each with all of its rows, and the statistic is taken over the rows drawn: rows
    of one patient are alike, and drawing them one by one would make the interval too narrow.

    Args:
        scores: one a row.
        groups: each row's group, such as its modality; needed for `macro`.
        statistic: `mean` over rows, or `macro`, the unweighted mean over groups of the groups' means, each group
            resampled by itself so that none is ever empty; a group of one unit stays as it is, and a unit with rows in
            several groups is drawn in each of them anew.
        units: each row's unit; by default every row is its own.
        n: resamples.
        seed: the same seed gives the same interval.
        level: share of resampled statistics inside the interval.

    Raises:
        ValueError: there are no scores, one is not a finite number, or an argument is out of range.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"statistic {statistic!r}: choose one of {', '.join(STATISTICS)}")
    if n < 1 or not 0 < level < 1:
        raise ValueError(f"n {n} and level {level}: expected at least one resample and a level between 0 and 1")
    values = _checked(scores, "scores")
    for name, given in (("groups", groups), ("units", units)):
        if given is None and (name == "units" or statistic == "mean"):
            continue
        if given is None or len(given) != len(values):
            found = "none" if given is None else str(len(given))
            raise ValueError(f"{name}: expected {len(values)}, as many as scores, got {found}")
    owners = np.arange(len(values)) if units is None else np.asarray(units)
    if statistic == "mean":
        strata = [(values, owners)]
    else:
        names = np.asarray(groups)
        strata = [(values[names == name], owners[names == name]) for name in sorted(set(groups or ()))]
    value = float(np.mean([scored.mean() for scored, _ in strata]))
    samples = [_sums_and_counts(*stratum) for stratum in strata]
    varying = [sample for sample in samples if sample.shape[1] > 1]
    if not varying:
        return Interval(value, None, None)
    from scipy.stats import bootstrap

    fixed = float(sum(sample[0, 0] / sample[1, 0] for sample in samples if sample.shape[1] == 1))

    def mean_of_means(*drawn: np.ndarray, axis: int) -> np.ndarray:
        total = fixed
        for sample, places in zip(varying, drawn, strict=True):
            sums, counts = sample[:, places.astype(int)]
            total = total + sums.sum(axis=axis) / counts.sum(axis=axis)
        return np.asarray(total / len(samples))

    found = bootstrap(
        [np.arange(sample.shape[1]) for sample in varying],
        mean_of_means,
        n_resamples=n,
        batch=100,
        vectorized=True,
        confidence_level=level,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def _sums_and_counts(values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """(2, units): the sum of each unit's values, and their number; units in the order of their first rows."""
    _, first, place = np.unique(owners, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))
    return np.stack([np.bincount(order[place], weights) for weights in (values, np.ones(len(values)))])


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    groups: Sequence[str] | None = None,
    statistic: str = "mean",
    units: Sequence[str] | None = None,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """How much better `a` is than `b` over the same rows: the interval of the differences a - b, resampled in pairs.

    Arguments and errors are those of `bootstrap_interval`; `a` and `b` must be of the same length.
    """
    first, second = _checked(a, "a"), _checked(b, "b")
    if len(first) != len(second):
        raise ValueError(f"a and b: expected scores of the same rows, got {len(first)} and {len(second)}")
    return bootstrap_interval((first - second).tolist(), groups, statistic, units, n, seed, level)


def _checked(scores: Sequence[float], name: str) -> np.ndarray:
    refused = [i for i, score in enumerate(scores) if score is None or not np.isfinite(score)]
    if refused:
        raise ValueError(f"{name}: {len(refused)} are no finite numbers, row {refused[0]} first: leave those rows out")
    if len(scores) == 0:
        raise ValueError(f"{name}: expected at least one score, got none")
    return np.asarray(scores, dtype=np.float64)
