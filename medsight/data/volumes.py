"""Volumes as rows: which slices of a scan are taken, as inference shows them, with masks from its label volumes.

A slice's picture is what `Scan.slice_image` gives, to the bit. Masks go through the same geometry: the same plane, the
same flips, drawn out to the same proportions. A volume and its labels are read once for all their slices.
"""

import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medsight.scans.nifti import NiftiScan
from medsight.scans.scan import Scan, orientation_of
from medsight.scans.windows import is_file_window, parse_window

from .pictures import encode_mask, encode_picture
from .records import check_regions, picture
from .registry import Entry, Source
from .schema import region_row


VOLUME_SUFFIXES = (".nii.gz", ".nii")
# What label maps call what is no structure, or was not looked at.
_NO_STRUCTURE = ("background", "bg", "ignore", "ignored", "unlabelled", "unlabeled", "void")
_LAYER = 255  # structures of a label volume of 8 bits


@dataclass(frozen=True)
class SliceOptions:
    """Which slices of a volume become rows, and how they are shown.

    Attributes:
        every: every n-th slice, counted from the first.
        unlabelled: share of those slices without any label that is taken too, drawn by the volume's name.
        window: as `Scan.slice_image` takes it; by default what suits the modality.

    Raises:
        ValueError: a value is not of that kind.

    Example:
        >>> SliceOptions(every=4, window="lung").unlabelled
        0.1
    """

    every: int = 1
    unlabelled: float = 0.1
    window: str | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not _is_count(self.every) or self.every < 1:
            raise ValueError(f"data every: expected a count of at least 1, got {self.every!r}")
        is_number = isinstance(self.unlabelled, (int, float)) and not isinstance(self.unlabelled, bool)
        if not is_number or not 0 <= self.unlabelled <= 1:
            raise ValueError(f"data unlabelled: expected a share from 0 to 1, got {self.unlabelled!r}")
        if self.window is not None and not is_file_window(self.window):
            parse_window(self.window)


@dataclass(frozen=True)
class VolumeOptions(SliceOptions):
    """Slices of NIfTI volumes.

    Attributes:
        planes: along which a volume is cut: axial, coronal, sagittal, or an orientation such as AI, see
            `medsight.scans.scan.orientation_of`.

    Example:
        >>> VolumeOptions(planes=["axial", "AI"]).every
        1
    """

    planes: Sequence[str] = ("axial",)

    def __post_init__(self) -> None:
        super().__post_init__()
        listed = isinstance(self.planes, (list, tuple)) and all(isinstance(plane, str) for plane in self.planes)
        if not listed or not self.planes or len(set(self.planes)) < len(self.planes):
            raise ValueError(f"data planes: expected a list such as [axial, coronal], got {self.planes!r}")
        for plane in self.planes:
            orientation_of(plane)
        object.__setattr__(self, "planes", tuple(self.planes))


@dataclass(frozen=True)
class ChannelOptions(VolumeOptions):
    """Slices of volumes of several channels.

    Attributes:
        channel: a channel by its number, from 0, or by its name; "all" makes each an image of its own.

    Example:
        >>> ChannelOptions(channel="FLAIR").planes
        ('axial',)
    """

    channel: int | str = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.channel, str) and (not _is_count(self.channel) or self.channel < 0):
            raise ValueError(f"data channel: expected a number from 0, a name, or all; got {self.channel!r}")

    def chosen(self, names: Sequence[str], place: str) -> list[int]:
        """The numbers of the channels that are asked for; raises a ValueError where there is none of that name."""
        if self.channel == "all":
            return [*range(len(names))]
        found = [number for number, name in enumerate(names) if self.channel in (number, name)]
        if not found:
            raise ValueError(f"{place}: no channel {self.channel!r}; its channels are {dict(enumerate(names))}")
        return found[:1]


class Structure(NamedTuple):
    """What some numbers of a label volume mean, and the file that says so.

    Example:
        >>> Structure("tumour", frozenset({2, 3}), "labels/a.nii.gz").target
        'tumour'
    """

    target: str
    numbers: frozenset[int]
    file: str


class LabelVolume(NamedTuple):
    """Whole numbers on the grid of a scan, as `Scan.to_source` returns masks, and what they mean.

    Example:
        >>> LabelVolume(np.zeros((4, 5, 6), np.uint8), [Structure("liver", frozenset({1}), "a.nii")]).numbers.shape
        (4, 5, 6)
    """

    numbers: np.ndarray
    structures: Sequence[Structure]


def named_numbers(labels: Any, place: str) -> list[tuple[str, frozenset[int]]]:
    """What the labels of a data set mean, by {name: number or numbers} or {number: name}.

    Background, and what is ignored, is there too, under its name.

    Raises:
        ValueError: it is neither, or two names share all their numbers.
    """
    if not isinstance(labels, Mapping) or not labels:
        raise ValueError(f"{place}: expected labels as {{name: number}} or {{number: name}}, got {labels!r}")
    found = []
    for key, value in labels.items():
        name, numbers = (value, key) if isinstance(value, str) else (key, value)
        numbers = list(numbers) if isinstance(numbers, (list, tuple)) else [numbers]
        numbers = [int(n) if isinstance(n, str) and re.fullmatch(r"\d{1,5}", n) else n for n in numbers]
        if not isinstance(name, str) or not name.strip() or not numbers or not all(map(_is_count, numbers)):
            raise ValueError(f"{place}: expected a name and a number or numbers of a label, got {key!r}: {value!r}")
        found.append((name, frozenset(numbers)))
    return found


def label_volume(numbers: np.ndarray, named: Sequence[tuple[str, frozenset[int]]], file: str) -> LabelVolume:
    """A label map, with what its numbers mean.

    Raises:
        ValueError: it has a number without a name.
    """
    known = frozenset[int]({0}).union(*(numbers for _, numbers in named))
    there = {number for slab in (numbers if numbers.ndim == 3 else [numbers]) for number in _present(slab)}
    if unknown := sorted(there - known):
        raise ValueError(f"{file}: label {unknown[0]} has no name; named are {sorted(known)}")
    structures = [Structure(name, own, file) for name, own in named if is_structure(name, own)]
    return LabelVolume(numbers, structures)


def is_structure(name: str, numbers: frozenset[int]) -> bool:
    """Whether a label means a structure, and not background or what nobody looked at."""
    return numbers != {0} and name.strip().lower() not in _NO_STRUCTURE


def stacked(masks: Iterable[tuple[str, str, np.ndarray]]) -> list[LabelVolume]:
    """Masks on the grid of a scan, which may overlap, as few label volumes in which none do.

    Args:
        masks: structure, file, and bool in the shape of `Scan.to_source`; taken one by one.
    """
    layers: list[tuple[np.ndarray, list[Structure]]] = []
    for target, file, mask in masks:
        if (box := _box(mask)) is None:
            continue
        part = mask[box]
        free = (layer for layer in layers if len(layer[1]) < _LAYER and not (part & (layer[0][box] > 0)).any())
        layer = next(free, None)
        if layer is None:
            layer = np.zeros_like(mask, dtype=np.uint8), []
            layers.append(layer)
        numbers, structures = layer
        structures.append(Structure(target, frozenset({len(structures) + 1}), file))
        numbers[box][part] = len(structures)
    return [LabelVolume(*layer) for layer in layers]


def _box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """The smallest box around a mask; None of an empty one."""
    box = [slice(None)] * mask.ndim
    for axis in sorted(range(mask.ndim), key=lambda axis: -mask.strides[axis]):  # whole planes of memory first
        others = tuple(other for other in range(mask.ndim) if other != axis)
        inside = np.flatnonzero(mask[tuple(box)].any(axis=others))
        if not inside.size:
            return None
        box[axis] = slice(int(inside[0]), int(inside[-1]) + 1)
    return tuple(box)


def slice_rows(
    scan: Scan, labels: Sequence[LabelVolume], options: SliceOptions, name: str, **known: Any
) -> Iterator[dict[str, Any]]:
    """The rows of a scan's slices: those that show a structure, and a share of the others.

    A scan of one slice is always a row. A picture in a file of its own stays in it.

    Args:
        labels: on the scan's own grid.
        name: of the volume, inside its data set: what the share is drawn by.
        known: further fields of the rows, such as `modality`.

    Raises:
        ValueError: a slice is damaged, or the scan is no NIfTI volume and cannot be cut along a plane.
    """
    planes = getattr(options, "planes", ())
    if isinstance(scan, NiftiScan):
        for plane in planes:
            yield from _rows(scan.turned(plane), f", {plane} slice {{}}", labels, options, f"{name}, {plane}", known)
        return
    if planes not in ((), ("axial",)):
        raise ValueError(
            f"{scan.name}: planes={list(planes)} are for NIfTI volumes, and this is shown as it is stored"
        )
    yield from _rows(scan, ", slice {}" if scan.num_slices > 1 else "", labels, options, name, known)


def _rows(
    scan: Scan, suffix: str, labels: Sequence[LabelVolume], options: SliceOptions, seed: str, known: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    shown = range(0, scan.num_slices, options.every)
    there = {index: [_present(scan.from_source(numbers, index)) for numbers, _ in labels] for index in shown}
    wanted = [frozenset[int]().union(*(structure.numbers for structure in structures)) for _, structures in labels]
    bare = [i for i in shown if not any(own & asked for own, asked in zip(there[i], wanted, strict=True))]
    share = 1 if scan.num_slices == 1 else options.unlabelled
    left_out = {*bare} - {*random.Random(seed).sample(bare, round(share * len(bare)))}
    for index in (index for index in shown if index not in left_out):
        found: Counter[str] = Counter()
        masks, targets = [], []
        for (numbers, structures), present in zip(labels, there[index], strict=True):
            on_slice = scan.from_source(numbers, index)
            for structure in structures:
                if inside := structure.numbers & present:
                    mask = np.isin(on_slice, [*inside])
                    path = f"{structure.file}, {structure.target}{suffix.format(index)}"
                    found[path] += 1
                    path += f", {found[path]}" if found[path] > 1 else ""
                    masks.append(encode_mask(scan.from_grid(mask), path))
                    targets.append(structure.target)
        row = region_row(
            _picture(scan, index, suffix, options),
            masks,
            targets,
            **{"orientation": scan.orientation, **known},
            spacing_mm=[_spacing(scan)] * len(masks),
        )
        check_regions(row, row["image"]["path"])
        yield row


def _picture(scan: Scan, index: int, suffix: str, options: SliceOptions) -> dict[str, Any]:
    if scan.kind == "image" and scan.num_slices == 1 and scan.files and options.window is None:
        return picture(scan.files[0])
    own_file = len(scan.files) == scan.num_slices > 1
    name = str(scan.files[index]) if own_file else f"{scan.name}{suffix.format(index)}"
    return encode_picture(scan.slice_image(index, options.window), name)


def _spacing(scan: Scan) -> tuple[float, float] | None:
    """(row, column) in mm of a slice as it is shown."""
    if scan.pixel_spacing is None:
        return None
    width, height = scan.picture_size
    return scan.pixel_spacing[0] * scan.height / height, scan.pixel_spacing[1] * scan.width / width


def _present(numbers: np.ndarray) -> set[int]:
    return {*np.flatnonzero(np.bincount(numbers.ravel())).tolist()}


def entries(place: str, rows: Iterator[dict[str, Any]], warnings: Iterable[str] = ()) -> Iterator[Entry]:
    """Rows as entries; what is wrong with a file ends them with an entry of its error."""
    told = tuple(warnings)
    try:
        first = next(rows, None)
        for row in chain([] if first is None else [first], rows):
            yield Entry(row["image"]["path"], row, warnings=told)
            told = ()
    except (OSError, ValueError) as error:
        yield Entry(place, error=error if isinstance(error, ValueError) else ValueError(f"{place}: {error}"))


def refuse_images(source: Source) -> None:
    """Raises a ValueError where a source names a folder of images, of a layout that finds them by itself."""
    if source.images is not None:
        raise ValueError(
            f"{source.path}: images={source.images!r} is of no use: the layout {source.layout} says where they are"
        )


def inside(folder: Path, name: Any, place: str) -> Path:
    """The path that a data set's own file names, relative to its folder.

    Raises:
        ValueError: it is no path, or leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{place}: expected the path of a file, got {name!r}")
    relative = os.path.normpath(name)
    if os.path.isabs(relative) or relative.split(os.sep)[0] == os.pardir:
        raise ValueError(f"{place}: {name!r} leads out of the folder {folder}")
    return folder / relative


def stem_of(path: Path, suffixes: Iterable[str] = VOLUME_SUFFIXES) -> str:
    """A file's name without its suffix, of which ".nii.gz" is one."""
    return next((path.name[: -len(suffix)] for suffix in suffixes if path.name.endswith(suffix)), path.stem)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**16
