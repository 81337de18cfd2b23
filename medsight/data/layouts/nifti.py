"""NIfTI volumes with label maps, or with a file a structure, beside them.

* `images/CASE.nii.gz` and `labels/CASE.nii.gz`, the latter perhaps with `_seg` or the like after CASE: label maps.
* `CASE.nii.gz` and `CASE_seg.nii.gz` (`-seg`, `_label`, `_mask`, `_segmentation`) in one folder: label maps; with any
  other word, as in `CASE_WORD.nii.gz` or `CASE_WORD_mask.nii.gz`: the mask of the structure WORD.
* TotalSegmentator: `SUBJECT/ct.nii.gz` (`mri.nii.gz`) and `SUBJECT/segmentations/STRUCTURE.nii.gz`; `meta.csv` beside
  the subjects may tell their splits.

What the numbers of label maps mean stands in `names`, or in the files themselves, as `medsight predict` and
TotalSegmentator write them.
"""

import csv
import logging
import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from medsight.scans.label_maps import label_names, read_label_map
from medsight.scans.nifti import NiftiScan
from medsight.text import first_few

from ..dataset_json import ABOUT
from ..modalities import coded_modality
from ..records import told_by_source
from ..registry import Entry, Layout, Source, register
from ..splits import canonical_split
from ..templates import read_yaml
from ..volumes import (
    VOLUME_SUFFIXES,
    VolumeOptions,
    entries,
    label_volume,
    named_numbers,
    refuse_images,
    slice_rows,
    stacked,
    stem_of,
)


logger = logging.getLogger(__name__)

_IMAGES = ("images", "image", "imgs", "img", "volumes", "scans")
_LABELS = ("labels", "label", "masks", "mask", "segmentations", "segmentation", "seg", "annotations")
_LOOKED_AT = 100  # folders, for what layout it is
_LABEL = re.compile(r"[_-](?:seg|segmentation|label|labels|mask|masks|labelmap)$", re.IGNORECASE)
_SUBJECT = ("ct", "mri", "mr")  # what TotalSegmentator calls the image of a subject
_STRUCTURES = "segmentations"
_SUBJECTS = "meta.csv"


@dataclass(frozen=True)
class NiftiOptions(VolumeOptions):
    """Slices of volumes whose label maps say by numbers what they show.

    Attributes:
        names: what the numbers mean: {number: name} or {name: number or numbers}; or a YAML or JSON file that says so,
            its path relative to that of the data.

    Example:
        >>> NiftiOptions(names={1: "liver", 2: "spleen"}).names[2]
        'spleen'
    """

    names: str | Mapping[Any, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.names, Mapping):
            named_numbers(self.names, "data names")
        elif not isinstance(self.names, (str, type(None))):
            raise ValueError(f"data names: expected {{number: name}}, or a file that says so, got {self.names!r}")


@dataclass(frozen=True)
class _Case:
    """An image and its labels: the file of each, and what structure it shows; None where it is a label map."""

    image: Path
    labels: dict[Path, str | None]
    is_subject: bool = False

    def place(self, source: Source) -> str:
        """The folder that it is in, from that of the data on; "" where it is just that."""
        folder = self.image.parent
        folder = folder.parent if folder.name.lower() in _IMAGES else folder
        place = os.path.relpath(folder, source.path) if os.path.isdir(source.path) else folder.name
        return "" if place == os.curdir or place.startswith(os.pardir) else Path(place).as_posix()

    def name(self, source: Source) -> str:
        place = self.place(source)
        if self.is_subject:
            return place or self.image.parent.name
        return f"{place}/{stem_of(self.image)}" if place else stem_of(self.image)


def nifti_shards(source: Source) -> list[str]:
    """The folders, that one and those in it, that have images with labels.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the source names another folder of images.
    """
    refuse_images(source)
    roots = [Path(source.path)] if Path(source.path).is_dir() else sorted(map(Path, glob(source.path)))
    folders = {folder for root in roots if root.is_dir() for folder in _folders(root)}
    labelled = {folder: [case.labels for case in _cases(folder)[0]] for folder in sorted(folders)}
    found = [str(folder) for folder, labels in labelled.items() if any(labels)]
    if not found:
        raise FileNotFoundError(
            f"{source.path}: no NIfTI volume with labels: expected images/CASE.nii.gz and labels/CASE.nii.gz, or "
            f"CASE.nii.gz and CASE_seg.nii.gz, or SUBJECT/ct.nii.gz and SUBJECT/{_STRUCTURES}/STRUCTURE.nii.gz"
        )
    if bare := [str(folder) for folder, labels in labelled.items() if labels and not any(labels)]:
        logger.warning(f"{source.path}: no volume has labels in {len(bare)} of its folders: {first_few(bare)}")
    return found


def nifti_rows(shard: str, source: Source) -> Iterator[Entry]:
    """The slices of the volumes of a folder, with masks of their label maps and of their structures' files."""
    cases, alone = _cases(Path(shard))
    for case in cases:
        yield from entries(str(case.image), _case_rows(case, len(cases) == 1, source))
    for file in alone:
        yield Entry(str(file), error=ValueError(f"{file}: no image of this label map, by its name, beside it"))


def _case_rows(case: _Case, is_alone: bool, source: Source) -> Iterator[dict[str, Any]]:
    """Those of an image, which may be alone in its folder: that is its patient then."""
    place, name = str(case.image), case.name(source)
    split = _split_of(case) if case.is_subject else None
    if not source.takes({"case": name}, split):
        return
    if not case.labels:
        raise ValueError(f"{place}: no label map of it, by its name, beside it")
    told = coded_modality(source, stem_of(case.image), place) if case.is_subject else None
    known = {
        "modality": told or told_by_source(source, "modality", place),
        "site": told_by_source(source, "site", place),
        "dataset": source.name,
        "patient": source.patient_of(case.image.parent if case.is_subject else case.image)
        or (is_alone and case.place(source))
        or name,
        "split": canonical_split(split or source.split or "train"),
    }
    scan = NiftiScan(case.image, place, "axial")
    maps = [file for file, structure in case.labels.items() if structure is None]
    labels = [label_volume(read_label_map(file, str(file), scan), _named(file, source), str(file)) for file in maps]
    labels += stacked(
        (structure, str(file), _mask(file, scan)) for file, structure in case.labels.items() if structure is not None
    )
    yield from slice_rows(scan, labels, source.options, name, **known)


def _named(file: Path, source: Source) -> list[tuple[str, frozenset[int]]]:
    """What the numbers of a label map mean: as the source says, or else the file."""
    names = source.options.names
    if isinstance(names, str):
        where = (Path(source.path) if os.path.isdir(source.path) else Path()) / os.path.expanduser(names)
        if not where.is_file():
            raise ValueError(f"data names: {where}: there is no such file")
        return named_numbers(read_yaml(where), str(where))
    names = names or label_names(file, str(file))
    if not names:
        raise ValueError(f"{file}: nothing says what its labels mean: say names: {{1: NAME, 2: NAME}}")
    return named_numbers(names, str(file))


def _mask(file: Path, scan: NiftiScan) -> np.ndarray:
    numbers = read_label_map(file, str(file), scan)
    if ((numbers != 0) & (numbers != numbers.max())).any():
        raise ValueError(f"{file}: expected the mask of one structure, by its name, got several labels")
    return numbers != 0


def _folders(root: Path, most: int | None = None) -> Iterator[Path]:
    """The folders, of the first so many from this one down, that have NIfTI volumes in them."""
    for folder, _, files in islice(os.walk(root), most):
        if any(file.endswith(VOLUME_SUFFIXES) for file in files):
            yield Path(folder)


def _volumes(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.nii*") if file.name.endswith(VOLUME_SUFFIXES) and file.is_file())


def _cases(folder: Path) -> tuple[list[_Case], list[Path]]:
    """The images of a folder, with their labels, in order; and label maps that are of none of them."""
    here = _volumes(folder)
    if folder.name.lower() in _LABELS and (_beside(folder, _IMAGES) or _subject_image(folder.parent)):
        return [], []
    if image := _subject_image(folder):
        structures: dict[Path, str | None] = {file: stem_of(file) for file in _volumes(folder / _STRUCTURES)}
        return [_Case(image, structures, is_subject=True)], []
    apart = _beside(folder, _LABELS) if folder.name.lower() in _IMAGES else []
    stems = {stem_of(file): file for file in here}
    found: dict[Path, dict[Path, str | None]] = {}
    alone = []
    for file in [label for place in apart for label in _volumes(place)] or here:
        stem = stem_of(file)
        cuts = [len(stem)] if apart else []
        cuts += [match.start() for match in re.finditer("[_-]", stem)][::-1]
        cut = next((cut for cut in cuts if stem[:cut] in stems), None)
        if cut is not None:
            is_map = cut == len(stem) or _LABEL.fullmatch(stem[cut:])
            structure = _LABEL.sub("", stem[cut + 1 :])  # CASE_tumour_mask shows a tumour
            found.setdefault(stems[stem[:cut]], {})[file] = None if is_map else structure
        elif apart:
            alone.append(file)
    of_others = set() if apart else {file for labels in found.values() for file in labels} - found.keys()
    images = [file for file in here if file not in of_others]
    return [_Case(file, _own(found.get(file, {}), found)) for file in images], alone


def _own(labels: dict[Path, str | None], images: Container[Path]) -> dict[Path, str | None]:
    """Labels but for those that are images, with labels of their own."""
    return {file: structure for file, structure in labels.items() if file not in images}


def _subject_image(folder: Path) -> Path | None:
    """The image of a subject in TotalSegmentator's layout."""
    names = (folder / f"{name}{suffix}" for name in _SUBJECT for suffix in VOLUME_SUFFIXES)
    return next((file for file in names if file.is_file()), None) if (folder / _STRUCTURES).is_dir() else None


def _beside(folder: Path, names: Sequence[str]) -> list[Path]:
    around = sorted(folder.absolute().parent.iterdir())
    return [folder.parent / other.name for other in around if other.name.lower() in names and other.is_dir()]


def _split_of(case: _Case) -> str | None:
    """The split of a subject, where the table of the subjects tells it."""
    table = case.image.parent.parent / _SUBJECTS
    if not table.is_file():
        return None
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter=";")
            splits = {row.get("image_id"): row.get("split") for row in rows}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{table}: not a table of text with ';' between its columns ({error})") from error
    return splits.get(case.image.parent.name) or None


def _looks_like(path: Path, record: Mapping[str, Any]) -> bool:
    if not path.is_dir() or (path / ABOUT).exists():
        return False
    return any(case.labels for folder in _folders(path, _LOOKED_AT) for case in _cases(folder)[0])


register(Layout("nifti", "regions", nifti_shards, nifti_rows, _looks_like, NiftiOptions, embeds=True))
