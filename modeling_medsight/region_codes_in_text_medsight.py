"""Region codes in token sequences: where they stand, which image each belongs to, and where they may come."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor
from transformers.utils import torch_compilable_check


@dataclass
class CodeLocations:
    """The n region codes of a batch of sequences, row by row, left to right.

    Args:
        rows, positions (`torch.LongTensor` of shape `(n,)`): row and column of each code.
        images (`torch.LongTensor` of shape `(n,)`): the image of each code, among all images of the batch.
        entries (`torch.LongTensor` of shape `(n,)`): codes of one row and one image, which are decoded together, share
            an entry.
        counts (`list[int]`): codes in each row.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    images: torch.Tensor
    entries: torch.Tensor
    counts: list[int]

    def to(self, device: torch.device) -> "CodeLocations":
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("rows", "positions", "images", "entries")}
        return CodeLocations(**moved, counts=self.counts)


def codes_to_indices(codes: Any, config: Any, as_pairs: bool = False) -> list[torch.Tensor]:
    """Group and index of region codes: (n_i, 2) long for each image.

    Args:
        codes: for each image its n_i codes, as token ids (n_i,) or, with `as_pairs`, as groups and indices (n_i, 2).

    Raises:
        ValueError: naming a code that does not exist.
    """
    found = []
    for image, entry in enumerate(codes):
        entry = torch.as_tensor(entry, dtype=torch.long)
        offsets = entry - config.region_code_start_id
        pairs = (offsets // config.codes_per_group, offsets % config.codes_per_group)
        indices = entry.reshape(-1, 2) if as_pairs else torch.stack(pairs, dim=1)
        exists = ((indices >= 0) & (indices < indices.new_tensor([config.num_groups, config.codes_per_group]))).all(1)
        if not bool(exists.all()):
            raise ValueError(
                f"image {image}: {entry[~exists][0].tolist()} is no region code: there are {config.num_groups} groups "
                f"of {config.codes_per_group} codes, with token ids from {config.region_code_start_id}"
            )
        found.append(indices)
    return found


def is_region_code(input_ids: torch.Tensor, config: Any) -> torch.Tensor:
    """Boolean, true where a token id is a region code."""
    first = config.region_code_start_id
    return (input_ids >= first) & (input_ids < first + config.num_region_codes)


def count_images(input_ids: torch.Tensor, config: Any) -> torch.Tensor:
    """Image blocks in each row of `input_ids` (batch, length): (batch,) long."""
    return (input_ids == config.image_token_id).sum(dim=1) // config.image_seq_length


def locate_codes(
    input_ids: torch.Tensor, config: Any, counts: list[int] | None = None, start: int = 0
) -> CodeLocations:
    """Find all region codes in `input_ids` (batch, length); a code belongs to the last image block before it.

    Args:
        counts: how many codes each row has, if known: needed under `torch.compile`, where nothing may depend on
            values.
        start: first column whose codes count.

    Raises:
        ValueError: if a code has no image before it.
    """
    device = input_ids.device
    codes = is_region_code(input_ids, config)
    codes[:, :start] = False
    counts = codes.sum(dim=1).tolist() if counts is None else counts
    rows = torch.tensor([row for row, n in enumerate(counts) for _ in range(n)], dtype=torch.long, device=device)
    ranks = torch.tensor([i for n in counts for i in range(n)], dtype=torch.long, device=device)
    positions = codes.long().argsort(dim=1, descending=True, stable=True)[rows, ranks]

    blocks = (input_ids == config.image_token_id).cumsum(dim=1) // config.image_seq_length
    blocks_before = blocks[rows, positions]
    torch_compilable_check(
        (blocks_before > 0).all(),
        lambda: next(
            f"row {row} has region code {int(input_ids[row, position])} at position {position} with no image before "
            "it: a code belongs to the last image before it"
            for row, position, before in zip(*(x.tolist() for x in (rows, positions, blocks_before)), strict=True)
            if not before
        ),
    )
    images = (blocks[:, -1].cumsum(0) - blocks[:, -1])[rows] + blocks_before - 1
    entries = images if torch.compiler.is_compiling() else images.unique(return_inverse=True)[1]
    return CodeLocations(rows, positions, images, entries, counts)


@dataclass(eq=False)
class RegionCodeConstraint(LogitsProcessor):
    """Keeps region codes to allowed groups and image placeholders out of answers, and on request lets no answer end
    without a code.

    Args:
        config: a `MedSightConfig`.
        allowed: (batch, K) boolean, the groups whose codes each row may use.
        end_ids: end-of-sequence token ids.
        prompt_length: columns of the prompt.
        force_region: put a code where the answer would end, or reach `max_length`, without one.
        max_length: columns that a sequence may have in all.

    Raises:
        ValueError: when it is called, a code has to come but other processors have ruled them all out.
    """

    config: Any
    allowed: torch.Tensor
    end_ids: list[int]
    prompt_length: int
    force_region: bool
    max_length: int
    refused: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        first, last = self.config.region_code_start_id, self.config.region_code_start_id + self.config.num_region_codes
        if self.refused is None or self.refused.shape != scores.shape:
            codes = self.allowed.to(scores.device).repeat_interleave(self.config.codes_per_group, dim=1)
            self.refused = torch.zeros_like(scores, dtype=torch.bool)
            self.refused[:, first:last] = ~codes.repeat_interleave(len(scores) // len(codes), dim=0)
            self.refused[:, self.config.image_token_id] = True  # it would be part of an image that nobody gave
        scores = scores.masked_fill(self.refused, -torch.inf)
        if not self.force_region:
            return scores

        without = ~is_region_code(input_ids[:, self.prompt_length :], self.config).any(dim=1)
        at_end = torch.isin(scores.argmax(dim=1), torch.tensor(self.end_ids, device=scores.device))
        if input_ids.shape[1] >= self.max_length - 1:
            at_end = torch.ones_like(at_end)
        codes_only = torch.full_like(scores, -torch.inf)
        codes_only[:, first:last] = scores[:, first:last]
        due = without & at_end
        if bool((due & codes_only.isneginf().all(dim=1)).any()):
            raise ValueError(
                "force_region=True: another logits processor or setting (suppress_tokens, forced_eos_token_id, "
                "bad_words_ids, ...) rules out every region code where one is due"
            )
        scores = torch.where(due[:, None], codes_only, scores)
        for end_id in self.end_ids:
            scores[:, end_id] = scores[:, end_id].masked_fill(without, -torch.inf)
        return scores
