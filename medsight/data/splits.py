"""Splits of training data: how files name them, and what is held out of a training split for validation.

All of a patient is held out or nothing, images and conversations alike, also beside other data.
"""

import hashlib
import logging
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from scipy.cluster.hierarchy import DisjointSet


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_SPELLINGS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPELLINGS |= dict.fromkeys(("validation", "validate", "valid", "val", "dev"), "validation")
_ORIGIN = ["dataset", "patient", "modality"]
_NAMED = re.compile(rf"(?:^|[_.\s-])({'|'.join(_SPELLINGS)})(?![a-z])")


def canonical_split(name: str) -> str:
    """One spelling for each split: "val", "valid", "validate" and "dev" are "validation"."""
    return _SPELLINGS.get(name.lower(), name)


def split_in_name(path: str | Path) -> str | None:
    """The split that a folder's or file's name tells, as do `data/train-00000.parquet` and `captions_val2017.json`."""
    for part in Path(path).parts:
        match = _NAMED.search(part.lower())
        if match:
            return _SPELLINGS[match[1]]
    return None


class Member(NamedTuple):
    """What decides on which side of a validation split a row comes."""

    dataset: str
    patient: str
    modality: str
    image: str


def divide(rows: "Dataset", held: set[int]) -> tuple["Dataset", "Dataset"]:
    """The rows that are trained on and those, by position, that are held out."""
    return rows.select([i for i in range(len(rows)) if i not in held]), rows.select(sorted(held))


def hold_out(members: Sequence[Member], fraction: float, seed: int, required: bool = True) -> set[int]:
    """Positions of the rows to hold out: `fraction` of every data set's patients, at least one.

    A data set of fewer than five patients gives the last images, by name, of each patient and modality instead (none
    where there are fewer than five): neighbours in one volume flatter the score, so it serves for choosing only.
    All rows of one image come on one side.

    Args:
        fraction: 0 holds out none.
        required: whether to refuse where nothing can be held out, though `fraction` is above 0.

    Raises:
        ValueError: `fraction` is not in [0, 1), or see `required`.

    Example:
        >>> patients = [Member("busi", f"p{number}", "ultrasound", f"{number}.png") for number in range(10)]
        >>> len(hold_out(patients, fraction=0.2, seed=0))
        2
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the validation fraction is {fraction}: expected at least 0 and less than 1")
    if fraction == 0:
        return set()
    by_dataset: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        by_dataset[member.dataset].append(member)
    held: set[str] = set()
    for dataset, rows in by_dataset.items():
        patients = sorted({member.patient for member in rows})
        if len(patients) >= 5:
            random.Random(f"{seed}:{dataset}").shuffle(patients)
            chosen = set(patients[: max(1, round(fraction * len(patients)))])
            held.update(member.image for member in rows if member.patient in chosen)
            continue
        series: dict[tuple[str, str], set[str]] = defaultdict(set)
        for member in rows:
            series[member.patient, member.modality].add(member.image)
        for images in series.values():
            if len(images) >= 5:
                held.update(sorted(images)[-max(1, round(fraction * len(images))) :])
    if not held and required:
        raise ValueError(
            f"a fraction {fraction} cannot be held out for validation: no data set has five patients, or five images "
            "of one patient; set data.validation_fraction to 0"
        )
    return {position for position, member in enumerate(members) if member.image in held}


def hold_out_rows(
    rows: "Dataset", fraction: float, seed: int, beside: Sequence[tuple["Dataset", "Dataset"]] = ()
) -> set[int]:
    """Positions of the rows to hold out for validation, by patient, as `hold_out` says.

    All rows about an image come on one side, whatever data set they are of, also where one of several images is
    shared; so do all of a patient, but of data sets of fewer than five. The same patients from conversations as from
    the images with masks of the same data, for the same fraction and seed. Images are told apart by their content.

    Args:
        rows: of `schema.REGION_FEATURES` or `schema.CONVERSATION_FEATURES`, map-style.
        beside: training and validation rows of other data, of either kind: rows about an image, or a patient of a data
            set, that is on one side there come on the same.

    Raises:
        ValueError: as `hold_out`; `beside` others, nothing need be left to hold out.
    """
    asked, *elsewhere = _named_rows([rows, *chain(*beside)])
    images = DisjointSet(name for _, shown in chain(asked, *elsewhere) for name in shown)
    for _, shown in asked:
        for name in shown:
            images.merge(shown[0], name)
    image_of, patients = _first_names(images), DisjointSet()
    owners: dict[str, str] = {}  # image -> one of its patients
    members = []
    for position, (row, shown) in enumerate(asked):
        image = image_of[shown[0]] if shown else f"row {position:09d}"
        patient = _patient(row) or image
        patients.add(patient)
        patients.merge(owners.setdefault(image, patient), patient)
        members.append(Member(row["dataset"] or "", patient, row["modality"] or "", image))
    patient_of = _first_names(patients)
    members = [member._replace(patient=patient_of[member.patient]) for member in members]

    # On which sides, True for held out, images and patients are elsewhere.
    of_images: dict[str, set[bool]] = defaultdict(set)
    of_patients: dict[str, set[bool]] = defaultdict(set)
    for part, is_held in zip(elsewhere, cycle([False, True]), strict=False):
        for row, shown in part:
            for name in shown:
                of_images[image_of[name]].add(is_held)
            if owner := _patient(row):
                of_patients[patient_of.get(owner, owner)].add(is_held)
    sides: dict[str, set[bool]] = defaultdict(set)  # by image
    for member in members:
        sides[member.image] |= of_images[member.image]
        if len(of_patients[member.patient]) == 1:  # a volume that is on both sides decides nothing
            sides[member.image] |= of_patients[member.patient]

    free = [position for position, member in enumerate(members) if not sides[member.image]]
    required = bool(members) and not beside
    drawn = {free[place] for place in hold_out([members[i] for i in free], fraction, seed, required)}
    left = {members[i][:2] for i in free if i not in drawn}  # a volume may be left in part
    whole = {members[i].patient for i in drawn if members[i][:2] not in left}
    drawn |= {i for i in free if members[i].patient in whole}
    held = drawn | {position for position, member in enumerate(members) if True in sides[member.image]}
    if fraction and members and not held:
        logger.warning("all rows are about images or patients whose masks are trained on: none is held out")
    return held


def _patient(row: dict[str, Any]) -> str | None:
    """A name of a row's patient that no other data set has."""
    return f"{row['dataset'] or ''}\0{row['patient']}" if row["patient"] else None


def _first_names(joined: DisjointSet) -> dict[str, str]:
    """For each name the first of those that it is joined with: a name of their set."""
    return {name: first for names in joined.subsets() for first in [min(names)] for name in names}


def _named_rows(sets: Sequence["Dataset"]) -> list[list[tuple[dict[str, Any], list[str]]]]:
    """The origin of each row of each data set, and the names of its images, by content."""
    name_of = picture_names(entry for rows in sets for _, shown in _rows(rows) for entry in shown)
    return [[(row, list(map(name_of, shown))) for row, shown in _rows(rows)] for rows in sets]


def picture_names(entries: Iterable[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], str]:
    """A function that names pictures, those of the same bytes alike: by the absolute path of a file, or the path that
    an embedded one was first met at. Only files of the size of another one are read.

    Args:
        entries: all that will be named.
    """
    sizes: dict[str, int | None] = {}  # of files; None for one that cannot be read, which goes by its path
    pictures: Counter[int | None] = Counter()  # by size
    for entry in entries:
        path = os.path.abspath(entry["path"] or "")
        if entry["bytes"] is not None:
            pictures[len(entry["bytes"])] += 1
        elif path not in sizes:
            sizes[path] = os.path.getsize(path) if os.path.isfile(path) else None
            pictures[sizes[path]] += 1
    named: dict[bytes, str] = {}

    @cache
    def file_name(path: str) -> str:
        size = sizes.get(path)
        if size is None or pictures[size] == 1:
            return path
        return named.setdefault(hashlib.sha256(Path(path).read_bytes()).digest(), path)

    def name(entry: Mapping[str, Any]) -> str:
        if entry["bytes"] is None:
            return file_name(os.path.abspath(entry["path"]))
        return named.setdefault(hashlib.sha256(entry["bytes"]).digest(), f"{entry['path']}\0{len(named)}")

    return name


def _rows(rows: "Dataset") -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The origin and the images, not decoded, of each row of either kind."""
    column = "image" if "image" in rows.column_names else "images"
    for row in rows.select_columns([*_ORIGIN, column]):
        images = row.pop(column)
        yield row, [images] if column == "image" else images or []
