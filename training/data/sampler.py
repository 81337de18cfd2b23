"""Which rows an epoch draws, and in what order: a pure function of seed and epoch."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


MEGABATCH = 50


class DrawSampler(Sampler[int]):
    """Yields draw numbers; the row is the draw number modulo the number of rows, so that each draw has its own chance.

    Args:
        size: number of rows; an epoch has as many draws.
        seed: source of the order.
        weights: (size,) chance of each row, drawn with replacement; without them every row is drawn once, shuffled.
        lengths: (size,) length of each row: rows of like length come together, in megabatches of 50 batches.
        batch_size: samples a batch, for `lengths`.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        weights: torch.Tensor | None = None,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
    ) -> None:
        self.size, self.seed, self.weights, self.lengths, self.batch_size = size, seed, weights, lengths, batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The trainer says which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.weights is None:
            order = torch.randperm(self.size, generator=generator).tolist()
        else:
            order = torch.multinomial(self.weights, self.size, replacement=True, generator=generator).tolist()
        if self.lengths is not None:
            order = self._by_length(order, generator)
        for position, row in enumerate(order):
            yield (self.epoch * self.size + position) * self.size + row

    def _by_length(self, order: list[int], generator: torch.Generator) -> list[int]:
        """Longest first within a megabatch; then whole batches are shuffled, the longest staying first: memory that
        is going to run out runs out at once."""
        step = MEGABATCH * self.batch_size
        parts = [order[start : start + step] for start in range(0, len(order), step)]
        ranked = [row for part in parts for row in sorted(part, key=lambda row: -self.lengths[row])]
        batches = [ranked[start : start + self.batch_size] for start in range(0, len(ranked), self.batch_size)]
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        batches = [batches[index] for index in shuffled]
        longest = max(range(len(batches)), key=lambda index: self.lengths[batches[index][0]], default=0)
        if batches:
            batches[0], batches[longest] = batches[longest], batches[0]
        return [row for batch in [*batches, *last] for row in batch]


def set_weights(sets: Sequence[str], power: float) -> torch.Tensor | None:
    """Chance of drawing each row: sets are drawn in proportion to (their size) ** power; none for power 1."""
    if power == 1:
        return None
    sizes: dict[str, int] = {}
    for name in sets:
        sizes[name] = sizes.get(name, 0) + 1
    weights = torch.tensor([sizes[name] ** (power - 1) for name in sets], dtype=torch.float64)
    return weights / weights.sum()
