"""Bootstrap intervals of mean scores, and of differences between two systems over the same rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


STATISTICS = ("mean", "macro")


class Interval(NamedTuple):
    """A statistic and its interval.

    Attributes:
        value: of the scores themselves.
        low, high: ends of the interval; None where nothing varies between resamples because no group has two scores.
    """

    value: float
    low: float | None
    high: float | None


def bootstrap_interval(
    scores: Sequence[float],
    groups: Sequence[str] | None = None,
    statistic: str = "mean",
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap (Efron and Tibshirani, 1993, chapter 13) over rows, which it takes as independent.

    Where rows share an image or a patient the interval is too narrow.

    Args:
        scores: one a row.
        groups: each row's group, such as its modality; needed for `macro`.
        statistic: `mean` over rows, or `macro`, the unweighted mean over groups of the groups' means, each group
            resampled by itself so that none is ever empty; a group of one score stays as it is.
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
    if statistic == "mean":
        samples = [values]
    else:
        if groups is None or len(groups) != len(values):
            given = "none" if groups is None else str(len(groups))
            raise ValueError(f"groups: expected {len(values)}, as many as scores, got {given}")
        names = np.asarray(groups)
        samples = [values[names == name] for name in sorted(set(groups))]
    value = float(np.mean([sample.mean() for sample in samples]))
    varying = [sample for sample in samples if len(sample) > 1]
    if not varying:
        return Interval(value, None, None)
    from scipy.stats import bootstrap

    fixed = float(sum(sample[0] for sample in samples if len(sample) == 1))

    def mean_of_means(*resampled: np.ndarray, axis: int) -> np.ndarray:
        return (sum(sample.mean(axis=axis) for sample in resampled) + fixed) / len(samples)

    found = bootstrap(
        varying,
        mean_of_means,
        n_resamples=n,
        batch=100,
        vectorized=True,
        confidence_level=level,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    groups: Sequence[str] | None = None,
    statistic: str = "mean",
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
    return bootstrap_interval((first - second).tolist(), groups, statistic, n, seed, level)


def _checked(scores: Sequence[float], name: str) -> np.ndarray:
    refused = [i for i, score in enumerate(scores) if score is None or not np.isfinite(score)]
    if refused:
        raise ValueError(f"{name}: {len(refused)} are no finite numbers, row {refused[0]} first: leave those rows out")
    if len(scores) == 0:
        raise ValueError(f"{name}: expected at least one score, got none")
    return np.asarray(scores, dtype=np.float64)
