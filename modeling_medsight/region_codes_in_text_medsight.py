"""Where region codes stand in token sequences, and which image each belongs to."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import torch_compilable_check


@dataclass
class CodeLocations:
    """The n region codes of a batch of sequences, row by row, left to right.

    Args:
        rows, positions (`torch.LongTensor` of shape `(n,)`): row and column of each code.
        images (`torch.LongTensor` of shape `(n,)`): index of each code's image among all images of the batch.
        entries (`torch.LongTensor` of shape `(n,)`): codes of one row and one image share an entry; they are decoded
            together.
        slots (`torch.LongTensor` of shape `(n,)`): place of the code within its entry.
        counts (`list[int]`): codes a row.
        num_entries (`int`): how many entries there are.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    images: torch.Tensor
    entries: torch.Tensor
    slots: torch.Tensor
    counts: list[int]
    num_entries: int


def is_region_code(input_ids: torch.Tensor, config: Any) -> torch.Tensor:
    """Boolean, true where a token id is a region code."""
    first = config.region_code_start_id
    return (input_ids >= first) & (input_ids < first + config.num_region_codes)


def count_images(input_ids: torch.Tensor, config: Any) -> torch.Tensor:
    """Image blocks in each row of `input_ids` (batch, length): (batch,) long."""
    return (input_ids == config.image_token_id).sum(dim=1) // config.image_seq_length


def locate_codes(
    input_ids: torch.Tensor,
    config: Any,
    counts: list[int] | None = None,
    first_image: torch.Tensor | None = None,
    left_out: torch.Tensor | None = None,
) -> CodeLocations:
    """Find all region codes in `input_ids` (batch, length); a code belongs to the last image block before it.

    Args:
        counts: how many codes each row has, if known: needed under `torch.compile`, where nothing may depend on
            values.
        first_image: (batch,) index of each row's first image; by default rows own their images in order.
        left_out: (batch, length) boolean, places whose codes do not count.

    Raises:
        ValueError: if a code has no image before it.
    """
    device = input_ids.device
    codes = is_region_code(input_ids, config)
    if left_out is not None:
        codes = codes & ~left_out
    counts = codes.sum(dim=1).tolist() if counts is None else counts
    blocks = (input_ids == config.image_token_id).cumsum(dim=1) // config.image_seq_length
    if first_image is None:
        first_image = blocks[:, -1].cumsum(0) - blocks[:, -1]

    rows = torch.tensor([row for row, n in enumerate(counts) for _ in range(n)], dtype=torch.long, device=device)
    ranks = torch.tensor([i for n in counts for i in range(n)], dtype=torch.long, device=device)
    positions = codes.long().argsort(dim=1, descending=True, stable=True)[rows, ranks]
    block = blocks[rows, positions] - 1
    images = first_image[rows] + block

    if torch.compiler.is_compiling():
        torch_compilable_check((block >= 0).all(), "a region code has no image before it")
        entries, num_entries = images, None
    else:
        if (block < 0).any():
            at = int((block < 0).nonzero()[0])
            raise ValueError(
                f"row {int(rows[at])} has region code {int(input_ids[rows[at], positions[at]])} at position "
                f"{int(positions[at])} with no image before it: a code belongs to the last image before it"
            )
        keys, entries = (rows * input_ids.shape[1] + block).unique(return_inverse=True)
        num_entries = len(keys)
    slots = (entries[:, None] == entries[None]).tril(-1).sum(dim=1)
    return CodeLocations(rows, positions, images, entries, slots, counts, num_entries)
