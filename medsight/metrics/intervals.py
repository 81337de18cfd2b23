"""Bootstrap intervals of mean scores, or of the differences between two systems over the same rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


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
    units: Sequence[str] | None = None,
    n: int = 1000,
    seed: int = 0,
) -> Interval:
    """95% percentile bootstrap (Efron and Tibshirani, 1993, chapter 13) over units, such as patients.

    Units are drawn with replacement, each with all of its rows, and the mean is taken over the rows drawn: rows of
    one patient are alike, and drawing them one by one would make the interval too narrow.

    Args:
        scores: one a row, finite.
        groups: each row's group, such as its modality. With them, the statistic is the macro mean, the unweighted
            mean over groups of the groups' means, each group resampled by itself so that none is ever empty; a group
            of one unit stays as it is, and a unit with rows in several groups is drawn in each of them anew.
        units: each row's unit; by default every row is its own.
        n: resamples.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: there are no scores, or not as many groups or units.

    Example:
        >>> bootstrap_interval([0.0, 1.0, 0.6], ["CT", "CT", "X-ray"])
        Interval(value=0.55, low=0.3, high=0.8)
    """
    values = np.asarray(scores, dtype=np.float64)
    for name, given in (("scores", scores), ("groups", groups), ("units", units)):
        if given is not None and len(given) != max(len(values), 1):
            raise ValueError(f"{name}: expected one a score, and a score at least, got {len(given)} for {len(values)}")
    owners = np.arange(len(values)) if units is None else np.asarray(units)
    names = np.asarray(groups if groups is not None else [""] * len(values))
    strata = [(values[names == name], owners[names == name]) for name in sorted(set(names.tolist()))]
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
        confidence_level=0.95,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def _sums_and_counts(values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """(2, units): the sum of each unit's values, and their number; units in the order of their first rows."""
    known = {owner: index for index, owner in enumerate(dict.fromkeys(owners.tolist()))}
    places = [known[owner] for owner in owners.tolist()]
    return np.stack([np.bincount(places, values), np.bincount(places).astype(float)])
