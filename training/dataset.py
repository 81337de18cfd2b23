"""Rows to samples: pictures decoded, placed as in inference, augmented together with their masks.

A sample depends on its row, the seed and its draw number alone: not on worker processes, on what was drawn before, or
on whether the run was interrupted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from medsight.data.conversations import cited_codes, code_images
from medsight.data.groups import Groups
from medsight.data.pictures import picture_name, read_mask, read_picture
from medsight.data.schema import IMAGE_MARKER
from modeling_medsight.loss_medsight import resize_masks
from processing_medsight.region_codes_medsight import region_code_ids

from .augmentation import Augmenter, names_a_place
from .encoding import encode


MIXER = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: neighbouring draws get unrelated seeds


@dataclass(frozen=True)
class Skipped:
    """In place of a sample that could not be read, where a recipe says `on_error: skip`."""

    reason: str


class Places:
    """How pixels and masks get onto the model's canvas, and what classes and groups are called.

    Args:
        processor: a `MedSightProcessor`.
        config: the model's `MedSightConfig`.
        groups: code groups.
        keep_in_memory: keep every placed picture and mask, so that a file is decoded once (by each worker process of a
            loader): for small data sets.
    """

    def __init__(self, processor: Any, config: Any, groups: Groups, keep_in_memory: bool = False) -> None:
        self.processor, self.config, self.groups = processor, config, groups
        self.kept: dict[str, Any] | None = {} if keep_in_memory else None
        self.image_processor = processor.image_processor
        self.classes = {name: index for index, name in enumerate(config.mask_class_names or [])}
        self.mean = torch.tensor(self.image_processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(self.image_processor.image_std).view(3, 1, 1)

    def group(self, row: dict[str, Any]) -> int:
        """The code group of a row; 0 without a codebook."""
        if not self.config.use_region_codebook:
            return 0
        return self.groups.index(row["modality"], row["site"])

    def class_of(self, target: str, name: str) -> int:
        """The mask class of a target; `name` is the file to blame where it has none."""
        if target not in self.classes:
            raise ValueError(f"{name}: target {target!r} is none of the model's {len(self.classes)} mask classes")
        return self.classes[target]

    def absent_classes(self, absent: Sequence[str], present: Sequence[str]) -> list[int]:
        """The mask classes of targets known to be absent: where there is no tumor, there is no benign tumor either."""
        return [
            index
            for name, index in self.classes.items()
            if name not in present and any(name == told or name.endswith(f" {told}") for told in absent)
        ]

    def pixels(self, picture: Any) -> torch.Tensor:
        """(3, S, S), normalised, as in inference."""
        return self.image_processor(images=picture, return_tensors="pt")["pixel_values"][0]

    def load_image(self, entry: Any) -> tuple[torch.Tensor, tuple[int, int]]:
        """Pixels of an undecoded picture, placed, and its own (width, height)."""

        def load() -> tuple[torch.Tensor, tuple[int, int]]:
            picture = read_picture(entry)
            return self.pixels(picture), picture.size

        return self._once(entry, load)

    def load_masks(self, entries: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Undecoded masks, placed, (n, S, S); `sizes` are the (width, height) of their pictures."""
        side = self.config.image_size

        def load(entry: Any, size: tuple[int, int]) -> torch.Tensor:
            return self.masks([read_mask(entry, size)], [picture_name(entry)])[0]

        placed = [self._once(entry, partial(load, entry, size)) for entry, size in zip(entries, sizes, strict=True)]
        return torch.stack(placed) if placed else torch.zeros(0, side, side)

    def _once(self, entry: Any, load: Callable[[], Any]) -> Any:
        path = entry.get("path") if isinstance(entry, dict) and entry.get("bytes") is None else None
        if self.kept is None or path is None:
            return load()
        if path not in self.kept:
            self.kept[path] = load()
        return self.kept[path]

    def masks(self, masks: Sequence[np.ndarray], names: Sequence[str]) -> torch.Tensor:
        """(n, S, S) in [0, 1] on the same canvas; `names` are the files to blame, one a mask.

        Raises:
            ValueError: nothing of a mask is on the canvas.
        """
        side = self.config.image_size
        if not len(masks):
            return torch.zeros(0, side, side)
        placed = self.image_processor.preprocess_masks(np.stack(masks), output_size=(side, side))
        unseen = (placed.flatten(1).amax(1) == 0).nonzero().flatten().tolist()
        if unseen:
            raise ValueError(
                f"{names[unseen[0]]}: the mask lies outside what the model sees of its image (its processor has "
                f"fit={self.image_processor.fit!r})"
            )
        return placed

    def augment(
        self,
        augmenter: Augmenter | None,
        pixels: torch.Tensor,
        masks: torch.Tensor,
        group: int,
        targets: Sequence[str],
        generator: torch.Generator,
        stays: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels and masks, moved together if at all; brightness changes before normalisation, as a camera's would."""
        if augmenter is not None:
            picture = (pixels * self.std + self.mean).clamp(0, 1)
            picture, masks = augmenter(picture, masks, group=group, targets=targets, generator=generator, stays=stays)
            pixels = (picture - self.mean) / self.std
        return pixels, resize_masks(masks, self.config.mask_size)


class Items(Dataset):
    """Samples of rows by draw number; row = draw mod number of rows.

    Args:
        rows: a map-style `datasets.Dataset` in one of the two schemas.
        places: canvas, classes and groups.
        augmenter: what moves and recolours pictures; none for validation.
        seed: of the augmentation and of what a sample draws.
        skip_errors: give a `Skipped` for a broken row in place of raising.
    """

    def __init__(
        self,
        rows: Any,
        places: Places,
        augmenter: Augmenter | None = None,
        seed: int = 0,
        skip_errors: bool = False,
    ) -> None:
        self.rows, self.places, self.augmenter = rows, places, augmenter
        self.seed, self.skip_errors = seed, skip_errors

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: int) -> dict[str, Any] | Skipped:
        return self.sample(self.rows[draw % len(self.rows)], draw)

    def sample(self, row: dict[str, Any], draw: int) -> dict[str, Any] | Skipped:
        """The sample of a row, with the chance of draw number `draw`.

        Raises:
            OSError, ValueError: a broken picture or mask, naming the file.
        """
        generator = torch.Generator().manual_seed((self.seed * MIXER + draw * (MIXER >> 1) + 1) % 2**63)
        try:
            return self._sample(row, generator)
        except (OSError, ValueError) as error:
            if not self.skip_errors:
                raise
            return Skipped(str(error))

    def _sample(self, row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        raise NotImplementedError


class RegionItems(Items):
    """Samples for the perceiver and the codebook: an image with all its masks.

    Args:
        most_asked: most classes that an image's class queries are asked for at once.
        matched_share: chance of an image to train the region queries besides the class queries.
    """

    def __init__(self, *args: Any, most_asked: int = 8, matched_share: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.most_asked, self.matched_share = most_asked, matched_share

    def _sample(self, row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        places, name = self.places, picture_name(row["image"])
        pixels, size = places.load_image(row["image"])
        masks = places.load_masks(row["masks"], [size] * len(row["masks"]))
        classes = torch.tensor([places.class_of(target, name) for target in row["targets"]], dtype=torch.long)
        absent = torch.tensor(places.absent_classes(row["absent"], row["targets"]), dtype=torch.long)
        group = places.groups.index(row["modality"], row["site"])  # also of a model without a codebook
        pixels, masks = places.augment(self.augmenter, pixels, masks, group, row["targets"], generator)
        count = (
            0
            if not len(masks)
            else int(torch.randint(1, min(self.most_asked, len(masks)) + 1, (1,), generator=generator))
        )
        return {
            "pixel_values": pixels,
            "mask_labels": masks,
            "class_labels": classes,
            "group": places.group(row),
            "asked": torch.cat((classes[torch.randperm(len(masks), generator=generator)[:count]], absent)),
            "chance": torch.rand(1, generator=generator).item(),
            "matched": self.matched_share,
            "file": name,
        }


class ConversationItems(Items):
    """Samples for the language stages: a conversation, its images, and the masks of the codes that it cites.

    Pictures are never mirrored here: a text may name a side. Where it says a place, nothing moves.

    Args:
        mask_share: chance of a conversation to have its codes decoded to masks.
        text_only: leave images, codes and masks out (stage 0).
        max_length: longest conversation in tokens; a longer one is an error naming it, never cut.
    """

    def __init__(
        self,
        *args: Any,
        mask_share: float = 1.0,
        text_only: bool = False,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.mask_share, self.text_only, self.max_length = mask_share, text_only, max_length
        self.codes = frozenset(region_code_ids(self.places.processor.tokenizer).values())

    def encoded(self, messages: list[dict[str, str]], name: str) -> tuple[list[int], list[int]]:
        """Token ids, and 1 where one is the assistant's."""
        ids, spoken = encode(messages, self.places.processor)
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(f"{name}: the conversation has {len(ids)} tokens, more than max_length={self.max_length}")
        return ids, spoken

    def _sample(self, row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        name = picture_name(row["images"][0]) if row["images"] else f"conversation {row['id']}"
        if self.text_only:
            messages = [
                {**turn, "content": turn["content"].replace(IMAGE_MARKER, "").strip()} for turn in row["messages"]
            ]
            encoded = self.encoded(messages, name)
            return {"encoded": encoded, "pixel_values": [], "mask_labels": None, "code_classes": None, "file": name}
        places = self.places
        loaded = [places.load_image(entry) for entry in row["images"]]
        owners = code_images(row["messages"])
        if len(owners) != len(row["masks"]) or -1 in owners:
            raise ValueError(
                f"{name}: conversation {row['id']} cites {len(owners)} codes, has {len(row['masks'])} masks"
            )
        unknown = [code for code in cited_codes(row["messages"]) if code not in self.codes]
        if unknown:
            raise ValueError(
                f"{name}: conversation {row['id']} cites {unknown[0]}, which is none of the model's "
                f"{len(self.codes)} region codes"
            )
        masks = places.load_masks(row["masks"], [loaded[owner][1] for owner in owners])
        classes = [places.classes.get(target, -1) for target in row["targets"]]
        all_pixels = [pixels for pixels, _ in loaded]
        if len(loaded) == 1:
            stays = any(names_a_place(turn["content"]) for turn in row["messages"])
            pixels, masks = places.augment(self.augmenter, all_pixels[0], masks, -1, row["targets"], generator, stays)
            all_pixels = [pixels]
        else:
            masks = resize_masks(masks, places.config.mask_size)
        decoded = torch.rand(1, generator=generator).item() < self.mask_share
        return {
            "encoded": self.encoded(row["messages"], name),
            "pixel_values": all_pixels,
            "mask_labels": masks if decoded or not len(masks) else None,
            "code_classes": torch.tensor(classes, dtype=torch.long),
            "file": name,
        }
