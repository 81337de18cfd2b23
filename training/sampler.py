"""Which rows an epoch draws, and in what order: a pure function of seed and epoch."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class DrawSampler(Sampler[int]):
    """Yields draw numbers; the row is the draw number modulo the number of rows, so that each draw has its own chance.

    Rows come in passes, each an order of all of them, or are drawn by `weights`. An epoch is a pass rounded up to
    whole steps: its last step takes the first rows of the next pass, where the next epoch goes on. So a step is the
    same samples for any number of processes and micro-batches, and no row is ever a pass ahead of another.

    Args:
        size: number of rows.
        seed: source of the order.
        weights: (size,) chance of each row, drawn with replacement; without them rows come in passes.
        batch_size: samples a step, over all processes and micro-batches.

    Example:

    ```python
    >>> from medsight.training.sampler import DrawSampler
    >>> sorted(draw % 4 for draw in DrawSampler(4, seed=0, batch_size=2))
    [0, 1, 2, 3]

    ```
    """

    def __init__(self, size: int, seed: int, weights: torch.Tensor | None = None, batch_size: int = 1) -> None:
        self.size, self.seed, self.weights, self.batch_size = size, seed, weights, batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The trainer says which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * len(self)
        if self.weights is None:
            order = self._of_passes(first)
        else:
            bounds = self.weights.cumsum(0)  # torch.multinomial takes 2^24 rows at most
            drawn = torch.rand(len(self), generator=self._generator(self.epoch), dtype=bounds.dtype) * bounds[-1]
            order = torch.searchsorted(bounds, drawn, right=True).tolist()
        for position, row in enumerate(order, start=first):
            yield position * self.size + row

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number)

    def _of_passes(self, first: int) -> list[int]:
        """The rows of an epoch's draws, which begin with draw `first` of all passes."""
        passes = range(first // self.size, -(-(first + len(self)) // self.size))
        orders = [torch.randperm(self.size, generator=self._generator(number)).tolist() for number in passes]
        rows = [row for order in orders for row in order]
        return rows[first % self.size :][: len(self)]


def rarity_weights(sets: Sequence[str | None], targets: Sequence[Sequence[str]], power: float) -> torch.Tensor | None:
    """Chance of drawing each row: in proportion to n ** (power - 1), where n rows of its set show its rarest target.

    So sets of one target are drawn in proportion to (their size) ** power, and a set of many targets more often (the
    repeat factors of LVIS, Gupta et al., 2019, within each set). A row without a target is drawn as often as the mean
    row of its set that has one.

    Returns:
        (rows,) of sum 1; none for power 1, where all rows are alike.
    """
    if power == 1:
        return None
    shown = Counter((name, target) for name, row in zip(sets, targets, strict=True) for target in set(row))
    sizes, sums, with_target = Counter(sets), Counter[str | None](), Counter[str | None]()
    weights = torch.zeros(len(sets), dtype=torch.float64)
    for i, (name, row) in enumerate(zip(sets, targets, strict=True)):
        if row:
            weights[i] = min(shown[name, target] for target in row) ** (power - 1)
            sums[name] += weights[i].item()
            with_target[name] += 1
    for i, (name, row) in enumerate(zip(sets, targets, strict=True)):
        if not row:
            weights[i] = sums[name] / with_target[name] if with_target[name] else sizes[name] ** (power - 1)
    return weights / weights.sum()


def with_replay(
    weights: torch.Tensor | None, sets: Sequence[str | None], replayed: Collection[str], share: float | None
) -> torch.Tensor | None:
    """Chances (rows,) in which rows of the replayed sets have that share of the whole; as they are without a share, or
    where all rows, or none, are of these sets."""
    is_replayed = torch.tensor([name in replayed for name in sets], dtype=torch.bool)
    if share is None or not 0 < int(is_replayed.sum()) < len(is_replayed):
        return weights
    chances = torch.ones(len(sets), dtype=torch.float64) if weights is None else weights.clone()
    for part, part_share in ((is_replayed, share), (~is_replayed, 1 - share)):
        chances[part] *= part_share / chances[part].sum()
    return chances
