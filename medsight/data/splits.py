"""Splits of training data: how files name them, and the part of a training split that is held out for validation."""

import random
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple


if TYPE_CHECKING:
    from datasets import Dataset

_SPELLINGS = {
    "training": "train",
    "train": "train",
    "validation": "validation",
    "validate": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "testing": "test",
    "test": "test",
}
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


def hold_out(members: Iterable[Member], fraction: float, seed: int, required: bool = True) -> set[int]:
    """Positions of the rows to hold out: `fraction` of every data set's patients, at least one.

    A data set of fewer than five patients gives the last images, by name, of each patient and modality instead (none
    where there are fewer than five): neighbours in one volume flatter the score, so it serves for choosing only.
    All rows of one image come on one side.

    Args:
        required: whether to refuse where nothing can be held out, though `fraction` is above 0.

    Raises:
        ValueError: `fraction` is not in [0, 1), or see `required`.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the validation fraction is {fraction}: expected at least 0 and less than 1")
    if fraction == 0:
        return set()
    members = list(members)
    by_dataset: dict[str, list[tuple[int, Member]]] = defaultdict(list)
    for position, member in enumerate(members):
        by_dataset[member.dataset].append((position, member))
    held: set[int] = set()
    for dataset, rows in sorted(by_dataset.items()):
        patients = sorted({member.patient for _, member in rows})
        if len(patients) >= 5:
            random.Random(f"{seed}:{dataset}").shuffle(patients)
            chosen = set(patients[: max(1, round(fraction * len(patients)))])
            held.update(position for position, member in rows if member.patient in chosen)
            continue
        series: dict[tuple[str, str], set[str]] = defaultdict(set)
        for _, member in rows:
            series[member.patient, member.modality].add(member.image)
        last: set[tuple[str, str]] = set()
        for (patient, _), images in series.items():
            count = max(1, round(fraction * len(images))) if len(images) >= 5 else 0
            last.update((patient, image) for image in sorted(images)[len(images) - count :])
        held.update(position for position, member in rows if (member.patient, member.image) in last)
    if not held and required:
        raise ValueError(
            f"a fraction {fraction} cannot be held out for validation: no data set has five patients, or five images "
            "of one patient; set data.validation_fraction to 0"
        )
    images = {members[position].image for position in held}
    return {position for position, member in enumerate(members) if member.image in images}
