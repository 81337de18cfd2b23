"""Samples to batches, as the model's forward takes them; `files` names them for error messages."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from processing_medsight.chat_medsight import neutralise_conversations

from .items import Skipped
from .schema import IMAGE_MARKER


IGNORED = -100
logger = logging.getLogger(__name__)


class Collator:
    """Leaves out skipped samples, counting and logging each.

    Attributes:
        skip_errors: leave out, too, a sample that no batch can hold; otherwise it is an error.
        skipped: how many were left out.
    """

    def __init__(self) -> None:
        self.skip_errors = False
        self.skipped = 0

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        samples = [sample if isinstance(sample, Skipped) else self._ready(sample) for sample in samples]
        kept = [sample for sample in samples if not isinstance(sample, Skipped)]
        for sample in samples:
            if isinstance(sample, Skipped):
                self.skipped += 1
                logger.warning("left out (number %d): %s", self.skipped, sample.reason)
        if not kept:
            raise ValueError(f"every item of a batch is broken; the last: {samples[-1].reason}")
        return {**self.collate(kept), "files": [sample["file"] for sample in kept]}

    def _ready(self, sample: dict[str, Any]) -> dict[str, Any] | Skipped:
        try:
            return self.ready(sample)
        except ValueError as error:
            if not self.skip_errors:
                raise
            return Skipped(str(error))

    def ready(self, sample: dict[str, Any]) -> dict[str, Any]:
        """What is done to a sample alone; raises ValueError for one that no batch can hold."""
        return sample

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
        super().__init__()
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
        label_prompts: label every word, the users' too (stage 0).
        class_labels: add `code_class_labels`.
        max_length: longest conversation in tokens; a longer one is an error naming it, never cut.
    """

    def __init__(
        self, processor: Any, label_prompts: bool = False, class_labels: bool = False, max_length: int | None = None
    ) -> None:
        super().__init__()
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.label_prompts, self.class_labels, self.max_length = label_prompts, class_labels, max_length

    def encode(self, messages: list[dict[str, str]], name: str) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, image blocks at full length, and 1 where a token is the assistant's."""
        chat = [{"role": turn["role"], "content": content_parts(turn)} for turn in messages]
        chat = neutralise_conversations(chat, self.tokenizer, self.processor.image_token)
        encoded = self.tokenizer.apply_chat_template(
            chat,
            chat_template=self.processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids: list[int] = []
        spoken: list[int] = []
        for token, assistant in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
            repeats = self.processor.image_seq_length if token == self.processor.image_token_id else 1
            ids += [token] * repeats
            spoken += [assistant] * repeats
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(f"{name}: the conversation has {len(ids)} tokens, more than max_length={self.max_length}")
        return ids, spoken

    def ready(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {**sample, "encoded": self.encode(sample["messages"], sample["file"])}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        encoded = [sample["encoded"] for sample in samples]
        shape = (len(samples), max(len(ids) for ids, _ in encoded))
        batch: dict[str, Any] = {
            "input_ids": torch.full(shape, self.tokenizer.pad_token_id),
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


def content_parts(turn: dict[str, str]) -> Any:
    """A turn's content for the chat template: the marker of an image becomes an image part."""
    if turn["role"] != "user" or IMAGE_MARKER not in turn["content"]:
        return turn["content"]
    parts: list[dict[str, str]] = []
    for index, text in enumerate(turn["content"].split(IMAGE_MARKER)):
        if index:
            parts.append({"type": "image"})
        text = text.strip("\n") if index else text
        if text:
            parts.append({"type": "text", "text": text})
    return parts
