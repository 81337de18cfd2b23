"""Rows to samples: pictures decoded, placed as in inference, augmented together with their masks.

A sample depends on its row, the seed and its draw number alone: not on worker processes, on what was drawn before, or
on whether the run was interrupted.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from medsight.data.conversations import cited_codes, code_images
from medsight.data.pictures import picture_name
from medsight.data.schema import IMAGE_MARKER
from modeling_medsight.loss_medsight import resize_masks
from processing_medsight.chat_medsight import neutralise_conversations
from processing_medsight.region_codes_medsight import region_code_ids

from .augmentation import Augmenter, names_a_place
from .canvas import Canvas


MIXER = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: neighbouring draws get unrelated seeds


@dataclass(frozen=True)
class Skipped:
    """In place of a sample that could not be read, where a recipe says `on_error: skip`."""

    reason: str


@dataclass(eq=False, repr=False)
class SampleDataset(Dataset):
    """Samples of rows by draw number; row = draw mod number of rows.

    Args:
        rows: a map-style `datasets.Dataset` in one of the two schemas.
        canvas: where pictures are placed, with its classes and groups.
        augmenter: what moves and recolours pictures; none for validation.
        seed: of the augmentation and of what a sample draws.
        skip_errors: give a `Skipped` for a broken row in place of raising.
    """

    rows: Any
    canvas: Canvas
    augmenter: Augmenter | None = None
    seed: int = 0
    skip_errors: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: int) -> dict[str, Any] | Skipped:
        generator = torch.Generator().manual_seed((self.seed * MIXER + draw * (MIXER >> 1) + 1) % 2**63)
        try:
            return self.sample(self.rows[draw % len(self.rows)], generator)
        except (OSError, ValueError) as error:
            if not self.skip_errors:
                raise
            return Skipped(str(error))

    def preload(self) -> None:
        """Have the canvas keep all pictures and masks now, so that a loader's worker processes share them."""
        for draw in range(len(self)):
            with contextlib.suppress(OSError, ValueError):  # a broken one is named when it is drawn
                self[draw]

    def sample(self, row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """The sample of a row, with the chance of `generator`.

        Raises:
            OSError, ValueError: a broken picture or mask, naming the file.
        """
        raise NotImplementedError


@dataclass(eq=False, repr=False)
class RegionDataset(SampleDataset):
    """Samples for the perceiver and the codebook: an image with all its masks.

    Args:
        most_asked: most classes that an image's class queries are asked for at once.
        matched_share: chance of an image to train the region queries besides the class queries.
        recalled: most classes that are asked of another model, see `Canvas.recallable`.
    """

    most_asked: int = 8
    matched_share: float = 1.0
    recalled: int = 0

    def sample(self, row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        canvas, name = self.canvas, picture_name(row["image"])
        pixels, size = canvas.load_image(row["image"])
        masks = canvas.load_masks(row["masks"], [size] * len(row["masks"]))
        classes = canvas.classes_of(row)
        absent = torch.tensor(canvas.absent_classes(row["absent"], row["targets"]), dtype=torch.long)
        if len(absent) > self.most_asked:
            absent = absent[torch.randperm(len(absent), generator=generator)[: self.most_asked]]
        group = canvas.groups.index(row["modality"], row["site"])  # also of a model without a codebook
        pixels, masks = canvas.augment(
            self.augmenter, pixels, masks, group=group, targets=row["targets"], generator=generator
        )
        count, most = 0, min(self.most_asked, len(masks))
        if len(masks):
            count = int(torch.randint(1, most + 1, (1,), generator=generator))
        sample: dict[str, Any] = {}
        if self.recalled:
            known = canvas.recallable(row)
            recalled = known[torch.randperm(len(known), generator=generator)[: self.recalled]]
            sample, absent = {"recalled": recalled}, torch.cat((absent, recalled))
        return sample | {
            "pixel_values": pixels,
            "mask_labels": masks,
            "class_labels": classes,
            "group": canvas.group(row),
            "unlabelled": canvas.unlabelled_classes(row),
            "asked": torch.cat((classes[torch.randperm(len(masks), generator=generator)[:count]], absent)),
            "chance": torch.rand(1, generator=generator).item(),
            "matched": self.matched_share,
            "file": name,
        }


@dataclass(eq=False, repr=False)
class ConversationDataset(SampleDataset):
    """Samples for stages on conversations: a conversation, its images, and the masks of the codes that it cites.

    Pictures are never mirrored here: a text may name a side. Where it says a place, nothing moves.

    Args:
        mask_share: chance of a conversation to have its codes decoded to masks.
        text_only: leave images, codes and masks out.
        max_length: longest conversation in tokens; a longer one is an error naming it, never cut.
    """

    mask_share: float = 1.0
    text_only: bool = False
    max_length: int | None = None

    def __post_init__(self) -> None:
        self.codes = frozenset(region_code_ids(self.canvas.processor.tokenizer).values())

    def sample(self, row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        name = picture_name(row["images"][0]) if row["images"] else f"conversation {row['id']}"
        messages = row["messages"]
        if self.text_only:
            messages = [{**turn, "content": turn["content"].replace(IMAGE_MARKER, "").strip()} for turn in messages]
        encoded = encode(messages, self.canvas.processor)
        length = len(encoded[0])
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"{name}: the conversation has {length} tokens, more than max_length={self.max_length}")
        sample: dict[str, Any] = {"encoded": encoded, "file": name}
        if self.text_only:
            return {**sample, "pixel_values": [], "mask_labels": None, "code_classes": None}
        canvas = self.canvas
        loaded = [canvas.load_image(entry) for entry in row["images"]]
        owners, said = code_images(messages), f"{name}: conversation {row['id']} cites"
        if len(owners) != len(row["masks"]) or -1 in owners:
            raise ValueError(f"{said} {len(owners)} codes, has {len(row['masks'])} masks")
        for code in cited_codes(messages):
            if code not in self.codes:
                raise ValueError(f"{said} {code}, which is none of the model's {len(self.codes)} region codes")
        masks = canvas.load_masks(row["masks"], [loaded[owner][1] for owner in owners])
        classes = [canvas.classes.get(target, -1) for target in row["targets"]]
        all_pixels = [pixels for pixels, _ in loaded]
        if len(loaded) == 1:
            stays = any(names_a_place(turn["content"]) for turn in messages)
            about = {"group": -1, "targets": row["targets"], "generator": generator, "stays": stays}
            pixels, masks = canvas.augment(self.augmenter, all_pixels[0], masks, **about)
            all_pixels = [pixels]
        else:
            masks = resize_masks(masks, canvas.config.mask_size)
        decoded = torch.rand(1, generator=generator).item() < self.mask_share
        return {
            **sample,
            "pixel_values": all_pixels,
            "mask_labels": masks if decoded or not len(masks) else None,
            "code_classes": torch.tensor(classes, dtype=torch.long),
        }


def encode(messages: list[dict[str, str]], processor: Any) -> tuple[list[int], list[int]]:
    """Token ids of a conversation as a `MedSightProcessor` makes them, with image blocks at full length, and 1 where a
    token is the assistant's."""
    chat = [{"role": turn["role"], "content": content_parts(turn)} for turn in messages]
    encoded = processor.tokenizer.apply_chat_template(
        neutralise_conversations(chat, processor.tokenizer, processor.image_token),
        chat_template=processor.chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, spoken = list[int](), list[int]()
    for token, assistant in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        repeats = processor.image_seq_length if token == processor.image_token_id else 1
        ids += [token] * repeats
        spoken += [assistant] * repeats
    return ids, spoken


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
