"""BiomedParse-layout images for training: records, split, decoded cache and augmentation.

A manifest row names one mask of one image; a record gathers the rows of one image. Pixels and masks go through the
shipped image processor once, are kept as uint8 and are augmented together, so training sees the geometry of inference.
"""

import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from processing_medsight.image_processing_medsight import MedSightImageProcessor


# (modality prefix, site) of the manifest -> group name; the first match counts
GROUP_RULES: tuple[tuple[str, str, str], ...] = (
    ("CT", "torso", "CT torso"),
    ("CT", "extremity", "CT extremity"),
    ("MRI", "torso", "MRI torso"),
    ("MRI", "extremity", "MRI extremity"),
    ("MRI", "brain", "MRI brain"),
    ("MRI", "heart", "MRI heart"),
    ("MRI", "breast", "MRI breast"),
    ("ultrasound", "breast", "ultrasound breast"),
    ("ultrasound", "fetal head", "ultrasound fetal head"),
    ("endoscope", "colon", "endoscopy colon"),
    ("dermoscopy", "skin", "dermoscopy skin"),
    ("fundus", "retina", "fundus retina"),
    ("X-Ray", "chest", "X-ray chest"),
    ("fluorescence", "cells", "fluorescence cells"),
    ("brightfield", "cells", "brightfield cells"),
    ("pathology", "", "histopathology"),
)
GROUP_NAMES: tuple[str, ...] = tuple(name for _, _, name in GROUP_RULES)
# pictures without an up and a down: any of the eight flips and quarter turns is another true picture
ORIENTATION_FREE = frozenset(
    {"endoscopy colon", "dermoscopy skin", "fluorescence cells", "brightfield cells", "histopathology"}
)


@dataclass(frozen=True)
class ImageRecord:
    """One image with all that the manifest says of it.

    Attributes:
        image: path of the image file.
        dataset: first folder of the image's path (the set's name).
        modality, site: as the manifest spells them.
        group: index into `GROUP_NAMES`.
        patient: the manifest's `group`; one patient stays on one side of a split.
        masks: target name -> path of its mask, in the manifest's order.
        absent: targets that the manifest says are not in the image.
        finding: e.g. "benign", or None.
    """

    image: Path
    dataset: str
    modality: str
    site: str
    group: int
    patient: str
    masks: dict[str, Path]
    absent: tuple[str, ...] = ()
    finding: str | None = None

    @property
    def targets(self) -> list[str]:
        return list(self.masks)


def group_of(modality: str, site: str) -> int:
    """Index of the group of a manifest row; raises ValueError for a pair that no rule covers."""
    for index, (prefix, where, _) in enumerate(GROUP_RULES):
        if modality.startswith(prefix) and where in ("", site):
            return index
    raise ValueError(f"no group for modality {modality!r} and site {site!r}: add a rule to GROUP_RULES")


def read_manifest(root: str | Path, split: str) -> list[ImageRecord]:
    """Read `root/manifest.jsonl` and gather the rows of `split` ("train" or "test") by image.

    Raises:
        FileNotFoundError: no manifest in `root`.
        ValueError: a line is no JSON object or lacks a field, named with its line number.
    """
    root = Path(root)
    manifest = root / "manifest.jsonl"
    if not manifest.is_file():
        raise FileNotFoundError(f"{manifest}: no such manifest; data.root must hold a BiomedParse folder")
    rows: dict[str, list[dict]] = defaultdict(list)
    for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            if row["split"] == split:
                rows[row["image"]].append(row)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest}, line {number}: not a manifest row ({error})") from error
    return [_record(root, name, group) for name, group in rows.items()]


def _record(root: Path, name: str, rows: list[dict]) -> ImageRecord:
    first = rows[0]
    findings = [row["finding"] for row in rows if row.get("finding")]
    return ImageRecord(
        image=root / name,
        dataset=name.split("/")[0],
        modality=first["modality"],
        site=first["site"],
        group=group_of(first["modality"], first["site"]),
        patient=first["group"],
        masks={row["target"]: root / row["mask"] for row in rows if not row.get("absent")},
        absent=tuple(row["target"] for row in rows if row.get("absent")),
        finding=findings[0] if findings else None,
    )


def class_names(records: Iterable[ImageRecord]) -> list[str]:
    """Distinct targets that have a mask, sorted: the perceiver's mask classes."""
    return sorted({target for record in records for target in record.masks})


def split_validation(
    records: list[ImageRecord], fraction: float, seed: int
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Hold out `fraction` of every set's patients, at least one.

    A set of fewer than five patients gives the last slices of each patient and site instead, as the data's own test
    split does for such sets: those neighbours in one volume flatter the score, so it serves for choosing only.

    Returns:
        Training and validation records. With `fraction` 0 all are training records.
    """
    if fraction == 0:
        return list(records), []
    held: set[Path] = set()
    by_set: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in records:
        by_set[record.dataset].append(record)
    for name, members in sorted(by_set.items()):
        patients = sorted({record.patient for record in members})
        if len(patients) >= 5:
            random.Random(f"{seed}:{name}").shuffle(patients)
            chosen = set(patients[: max(1, round(fraction * len(patients)))])
            held.update(record.image for record in members if record.patient in chosen)
            continue
        series: dict[tuple[str, str], list[Path]] = defaultdict(list)
        for record in members:
            series[record.patient, record.modality].append(record.image)
        for images in series.values():
            count = round(fraction * len(images)) if len(images) > 4 else 0
            held.update(sorted(images)[len(images) - count :])
    return [r for r in records if r.image not in held], [r for r in records if r.image in held]


def read_image(path: Path) -> Image.Image:
    """Decode an image file wholly; a bad one raises ValueError naming the file."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Decode a mask file to a boolean (height, width) array; `size` is (width, height) of its image."""
    image = read_image(path)
    if image.size != size:
        raise ValueError(f"{path}: the mask is {image.size[0]}x{image.size[1]}, its image {size[0]}x{size[1]}")
    mask = np.asarray(image.convert("L")) > 0
    if not mask.any():
        raise ValueError(f"{path}: the mask is empty; an absent target has `absent: true` and no mask")
    return mask


@dataclass
class Sample:
    """Pixels and masks of one record on the model's square canvas.

    Attributes:
        record: where it came from.
        pixels: uint8 (3, S, S), before normalisation.
        masks: uint8 (n, S, S), 255 inside, in the order of `record.targets`.
    """

    record: ImageRecord
    pixels: torch.Tensor
    masks: torch.Tensor


def load_samples(records: Iterable[ImageRecord], image_processor: MedSightImageProcessor) -> list[Sample]:
    """Decode records through the shipped image processor; raises on the first bad file, naming it."""
    samples = []
    for record in records:
        image = read_image(record.image)
        features = image_processor(images=image, return_tensors="pt")
        mean, std = normalisation(image_processor)
        pixels = (features["pixel_values"][0] * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
        side = pixels.shape[-1]
        masks = [read_mask(path, image.size) for path in record.masks.values()]
        placed = torch.zeros(0, side, side, dtype=torch.uint8)
        if masks:
            grid = image_processor.preprocess_masks(np.stack(masks), output_size=(side, side))
            placed = (torch.as_tensor(grid).float() * 255).round().clamp(0, 255).to(torch.uint8)
        samples.append(Sample(record, pixels, placed))
    return samples


def normalisation(image_processor: MedSightImageProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the processor as (3, 1, 1) tensors."""
    mean = torch.tensor(image_processor.image_mean, dtype=torch.float32).view(3, 1, 1)
    std = torch.tensor(image_processor.image_std, dtype=torch.float32).view(3, 1, 1)
    return mean, std


@dataclass(frozen=True)
class Augmentation:
    """Strengths of the augmentation; every value is a largest deviation, 0 switches that part off."""

    rotate: float = 15.0
    scale: float = 0.15
    shift: float = 0.08
    brightness: float = 0.15
    contrast: float = 0.25
    gamma: float = 0.3
    noise: float = 0.03
    flip: bool = True


@dataclass
class Augmenter:
    """Moves images and their masks together.

    `sided` are the groups with a target named left or right: none of their images is ever flipped, so that a liver
    stays on its side even in a slice that shows no sided target.
    """

    settings: Augmentation
    sided: frozenset[int]
    generator: torch.Generator = field(default_factory=torch.Generator)

    def _uniform(self, count: int, extent: float) -> torch.Tensor:
        return (torch.rand(count, generator=self.generator) * 2 - 1) * extent

    def _flips(self, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Signs of x and of y for every sample."""
        across, down = torch.ones(len(samples)), torch.ones(len(samples))
        if self.settings.flip:
            coins = torch.rand(len(samples), 2, generator=self.generator) < 0.5
            for i, sample in enumerate(samples):
                if sample.record.group in self.sided or any(map(is_sided, sample.record.targets)):
                    continue
                across[i] = -1 if coins[i, 0] else 1
                if GROUP_NAMES[sample.record.group] in ORIENTATION_FREE:
                    down[i] = -1 if coins[i, 1] else 1
        return across, down

    def __call__(self, samples: list[Sample]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return pixels (B, 3, S, S) in 0..1 and, a sample, masks (n, S, S) in 0..1."""
        count, options = len(samples), self.settings
        across, down = self._flips(samples)
        angle = self._uniform(count, math.radians(options.rotate))
        scale = torch.exp(self._uniform(count, options.scale))
        cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
        shift = torch.stack([self._uniform(count, 2 * options.shift) for _ in range(2)], 1)
        matrix = torch.stack(
            [torch.stack([cos * across, -sin * down], 1), torch.stack([sin * across, cos * down], 1)], 1
        )
        theta = torch.cat([matrix, shift[:, :, None]], 2)
        images = torch.stack([sample.pixels for sample in samples]).float() / 255
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, align_corners=False)
        counts = [len(sample.masks) for sample in samples]
        masks = torch.cat([sample.masks for sample in samples]).float()[:, None] / 255
        if len(masks):
            owner = torch.repeat_interleave(torch.arange(count), torch.tensor(counts))
            masks = F.grid_sample(masks, grid[owner], align_corners=False)
        return self._photometric(images), list(masks[:, 0].split(counts))

    def _photometric(self, images: torch.Tensor) -> torch.Tensor:
        options, count = self.settings, len(images)
        gamma = torch.exp(self._uniform(count, options.gamma)).view(-1, 1, 1, 1)
        contrast = (1 + self._uniform(count, options.contrast)).view(-1, 1, 1, 1)
        brightness = self._uniform(count, options.brightness).view(-1, 1, 1, 1)
        images = images.clamp(1e-4, 1).pow(gamma)
        centre = images.mean((1, 2, 3), keepdim=True)
        images = (images - centre) * contrast + centre + brightness
        strength = torch.rand(count, 1, 1, 1, generator=self.generator) * options.noise
        noise = torch.randn(count, 1, *images.shape[2:], generator=self.generator) * strength
        return (images + noise).clamp(0, 1)


def is_sided(target: str) -> bool:
    """Whether a target's name says left or right ("left ventricle" names a chamber, not a side of the body)."""
    words = target.split()
    return target != "left ventricle" and ("left" in words or "right" in words)


def sided_groups(records: Iterable[ImageRecord]) -> frozenset[int]:
    """Groups in which any target is named left or right."""
    return frozenset(record.group for record in records if any(map(is_sided, record.targets)))


def unaugmented(samples: list[Sample]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Pixels (B, 3, S, S) and masks (n, S, S) a sample in 0..1, as the image processor placed them."""
    pixels = torch.stack([sample.pixels for sample in samples]).float() / 255
    return pixels, [sample.masks.float() / 255 for sample in samples]


def sampling_weights(records: list[ImageRecord], power: float) -> torch.Tensor:
    """Probability of drawing each record: sets are drawn in proportion to (their size) ** power."""
    sizes: dict[str, int] = defaultdict(int)
    for record in records:
        sizes[record.dataset] += 1
    weights = torch.tensor([sizes[record.dataset] ** (power - 1) for record in records], dtype=torch.float64)
    return weights / weights.sum()
