"""Samples to batches, as the model's forward takes them; `files` names them for error messages."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from .dataset import Skipped


IGNORED = -100
logger = logging.getLogger(__name__)


class Collator:
    """Leaves out skipped samples and logs each; the batch says how many under `skipped`. One without any sample left
    has nothing else in it but empty `files`.
    """

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        good = []
        for sample in samples:
            if isinstance(sample, Skipped):
                logger.warning("left out: %s", sample.reason)
            else:
                good.append(sample)
        batch = {**(self.collate(good) if good else {}), "files": [sample["file"] for sample in good]}
        return {**batch, "skipped": len(samples) - len(good)} if len(good) < len(samples) else batch

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of at least one sample."""
        raise NotImplementedError


class RegionCollator(Collator):
    """Batches of images with masks.

    Args:
        class_queries: whether the model has these; then `asked_classes` and `matched_images` are set.
        groups: whether to add `group_labels`, which makes it a batch for the codebook.
    """

    def __init__(self, class_queries: bool = False, groups: bool = False) -> None:
        self.class_queries, self.groups = class_queries, groups

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "mask_labels": [sample["mask_labels"] for sample in samples],
            "class_labels": [sample["class_labels"] for sample in samples],
        }
        if self.groups:
            batch["group_labels"] = torch.tensor([sample["group"] for sample in samples])
        elif self.class_queries:
            batch["asked_classes"] = [sample["asked"] for sample in samples]
            chances = torch.tensor([sample["chance"] for sample in samples])
            matched = (chances < samples[0]["matched"]).nonzero()[:, 0]
            batch["matched_images"] = matched if len(matched) else chances.argmin()[None]
        return batch


class ConversationCollator(Collator):
    """Batches of conversations: right-padded ids, labels on the assistants' words, images and masks.

    Args:
        processor: a `MedSightProcessor`.
        label_prompts: label every word, the users' too.
        class_labels: add `code_class_labels`.
    """

    def __init__(self, processor: Any, label_prompts: bool = False, class_labels: bool = False) -> None:
        self.pad_token_id = processor.tokenizer.pad_token_id
        self.label_prompts, self.class_labels = label_prompts, class_labels

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        encoded = [sample["encoded"] for sample in samples]
        shape = (len(samples), max(len(ids) for ids, _ in encoded))
        batch: dict[str, Any] = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
        }
        for row, (ids, spoken) in enumerate(encoded):
            tokens = torch.tensor(ids)
            labelled = torch.ones(len(ids), dtype=torch.bool) if self.label_prompts else torch.tensor(spoken).bool()
            batch["input_ids"][row, : len(ids)] = tokens
            batch["attention_mask"][row, : len(ids)] = 1
            batch["labels"][row, : len(ids)] = tokens.where(labelled, IGNORED)
        pixels = [pixels for sample in samples for pixels in sample["pixel_values"]]
        if pixels:
            batch["pixel_values"] = torch.stack(pixels)
        if samples[0]["code_classes"] is not None:
            batch["mask_labels"] = [sample["mask_labels"] for sample in samples]
            if self.class_labels:
                batch["code_class_labels"] = [sample["code_classes"] for sample in samples]
        return batch
