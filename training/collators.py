"""Samples to batches, as the model's forward takes them; `files` names them for error messages."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .dataset import Skipped


IGNORED = -100
logger = logging.getLogger(__name__)


class Collator:
    """Leaves out skipped samples and logs each; the batch says how many under `skipped`. One without any sample left
    has nothing else in it but empty `files`.
    """

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        for sample in samples:
            if isinstance(sample, Skipped):
                logger.warning("left out: %s", sample.reason)
        good = [sample for sample in samples if not isinstance(sample, Skipped)]
        batch = {**(self.collate(good) if good else {}), "files": [sample["file"] for sample in good]}
        return {**batch, "skipped": len(samples) - len(good)} if len(good) < len(samples) else batch

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of at least one sample."""
        raise NotImplementedError


@dataclass
class RegionCollator(Collator):
    """Batches of images with masks.

    Args:
        class_queries: whether the model has these; then `asked_classes` and `matched_images` are set.
        groups: whether to add `group_labels`, which makes it a batch for the codebook.
    """

    class_queries: bool = False
    groups: bool = False

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "mask_labels": [sample["mask_labels"] for sample in samples],
            "class_labels": [sample["class_labels"] for sample in samples],
            "unlabelled_classes": torch.stack([sample["unlabelled"] for sample in samples]),
        }
        if self.groups:
            batch["group_labels"] = torch.tensor([sample["group"] for sample in samples])
        elif self.class_queries:
            if "recalled" in samples[0]:
                batch["recalled_classes"] = [sample["recalled"] for sample in samples]
            batch["asked_classes"] = [sample["asked"] for sample in samples]
            chances = torch.tensor([sample["chance"] for sample in samples])
            matched = (chances < samples[0]["matched"]).nonzero()[:, 0]
            batch["matched_images"] = matched if len(matched) else chances.argmin()[None]
        return batch


@dataclass
class ConversationCollator(Collator):
    """Batches of conversations: right-padded ids, labels on the assistants' words, images and masks.

    Args:
        processor: a `MedSightProcessor`.
        label_prompts: label every word, the users' too.
        class_labels: add `code_class_labels`.
    """

    processor: Any
    label_prompts: bool = False
    class_labels: bool = False

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        encoded = zip(*(sample["encoded"] for sample in samples), strict=True)
        tokens, spoken = ([torch.tensor(row) for row in rows] for rows in encoded)
        said = [ids.where(words.bool(), IGNORED) for ids, words in zip(tokens, spoken, strict=True)]
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(tokens, True, self.processor.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in tokens], True),
            "labels": pad_sequence(tokens if self.label_prompts else said, True, IGNORED),
        }
        pixels = [pixels for sample in samples for pixels in sample["pixel_values"]]
        if pixels:
            batch["pixel_values"] = torch.stack(pixels)
        if samples[0]["code_classes"] is not None:
            batch["mask_labels"] = [sample["mask_labels"] for sample in samples]
            if self.class_labels:
                batch["code_class_labels"] = [sample["code_classes"] for sample in samples]
        return batch
