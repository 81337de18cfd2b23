"""Pictures and masks on the model's canvas, as in inference."""

import hashlib
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from medsight.data.groups import Groups
from medsight.data.pictures import picture_name, read_mask, read_picture
from modeling_medsight.loss_medsight import resize_masks

from .augmentation import Augmenter


class Canvas:
    """How pixels and masks get onto the model's canvas, and what classes and groups are called.

    Args:
        processor: a `MedSightProcessor`.
        config: the model's `MedSightConfig`.
        groups: code groups.
        keep_in_memory: keep every placed picture and mask, so that each is decoded once: for small data sets.
        elsewhere: for each group, structures that its images cannot show; none is known of by default.
        known: for each group, structures that the model has learnt to find; none by default.
    """

    def __init__(
        self,
        processor: Any,
        config: Any,
        groups: Groups,
        keep_in_memory: bool = False,
        elsewhere: Sequence[Collection[str]] | None = None,
        known: Sequence[Collection[str]] | None = None,
    ) -> None:
        self.processor, self.config, self.groups = processor, config, groups
        nothing: list[tuple[str, ...]] = [()] * len(groups.names)
        self.elsewhere, self.known = elsewhere or nothing, known or nothing
        self.loaded: dict[tuple[str, bytes | None], Any] | None = {} if keep_in_memory else None
        self.image_processor = processor.image_processor
        self.classes = {name: index for index, name in enumerate(config.mask_class_names or [])}
        self.mean = torch.tensor(self.image_processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(self.image_processor.image_std).view(3, 1, 1)

    def group(self, row: dict[str, Any]) -> int:
        """The code group of a row; 0 without a codebook."""
        if not self.config.use_region_codebook:
            return 0
        return self.groups.index(row["modality"], row["site"])

    def classes_of(self, row: dict[str, Any]) -> torch.Tensor:
        """(n,) long, the mask classes of a row's targets."""
        for target in row["targets"]:
            if target not in self.classes:
                name = picture_name(row["image"])
                raise ValueError(f"{name}: target {target!r} is none of the model's {len(self.classes)} mask classes")
        return torch.tensor([self.classes[target] for target in row["targets"]], dtype=torch.long)

    def absent_classes(self, absent: Sequence[str], present: Sequence[str]) -> list[int]:
        """The mask classes of targets known to be absent: where there is no tumor, there is no benign tumor either."""
        return [
            index
            for name, index in self.classes.items()
            if name not in present and any(name == other or name.endswith(f" {other}") for other in absent)
        ]

    def unlabelled_classes(self, row: dict[str, Any]) -> torch.Tensor:
        """(classes,) boolean, the mask classes that nobody looked for in a row's image: neither shown nor absent, and
        not known to be of other images alone."""
        unlabelled = torch.ones(self.config.num_mask_classes, dtype=torch.bool)
        unlabelled[self.classes_of(row)] = False
        unlabelled[self.absent_classes(row["absent"], row["targets"])] = False
        elsewhere = self.elsewhere[self.groups.index(row["modality"], row["site"])]
        unlabelled[[self.classes[name] for name in elsewhere if name in self.classes]] = False
        return unlabelled

    def recallable(self, row: dict[str, Any]) -> torch.Tensor:
        """(n,) long, classes that nobody looked for in a row's image, and that the model has learnt to find in such
        images."""
        known, unlabelled = self.known[self.group(row)], self.unlabelled_classes(row)
        indices = [self.classes[name] for name in sorted(known) if name in self.classes]
        return torch.tensor([index for index in indices if unlabelled[index]], dtype=torch.long)

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
        placed = [self._load_mask(entry, size) for entry, size in zip(entries, sizes, strict=True)]
        return torch.stack(placed) if placed else torch.zeros(0, side, side)

    def _load_mask(self, entry: Any, size: tuple[int, int]) -> torch.Tensor:
        def load() -> torch.Tensor:
            return self.masks([read_mask(entry, size)], [picture_name(entry)])[0]

        if self.loaded is None:
            return load()
        # nearly all zeros and ones
        packed = self._once(entry, lambda: zlib.compress(load().numpy().tobytes(), level=1))
        side = self.config.image_size
        return torch.frombuffer(bytearray(zlib.decompress(packed)), dtype=torch.float32).view(side, side)

    def _once(self, entry: Any, load: Callable[[], Any]) -> Any:
        if self.loaded is None or not isinstance(entry, dict) or entry.get("path") is None:
            return load()
        content = entry.get("bytes")  # of an embedded picture, whose name says where it is from
        key = entry["path"], None if content is None else hashlib.sha256(content).digest()
        if key not in self.loaded:
            self.loaded[key] = load()
        return self.loaded[key]

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
        self, augmenter: Augmenter | None, pixels: torch.Tensor, masks: torch.Tensor, **about: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels and masks, moved together if at all; brightness changes before normalisation, as a camera's would.

        Args:
            about: `group`, `targets`, `generator` and `stays`, as an [`Augmenter`] takes them.
        """
        if augmenter is not None:
            picture = (pixels * self.std + self.mean).clamp(0, 1)
            picture, masks = augmenter(picture, masks, **about)
            pixels = (picture - self.mean) / self.std
        return pixels, resize_masks(masks, self.config.mask_size)
