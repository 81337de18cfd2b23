"""Conversations held out for validation: all of an image and of a patient on one side, also beside other data."""

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .splits import Member, hold_out


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def hold_out_conversations(
    rows: "Dataset", fraction: float, seed: int, beside: Sequence[tuple["Dataset", "Dataset"]] = ()
) -> set[int]:
    """Positions of the conversations to hold out for validation, by patient, as `splits.hold_out` says.

    All conversations of an image come on one side, whatever data set they are of, also where one of several images is
    shared; so do all of a patient, but of data sets of fewer than five. The same patients as from the images of the
    same data, for the same fraction and seed. Images are told apart by their paths, and none is read; where any is
    embedded, by their content.

    Args:
        rows: of `schema.CONVERSATION_FEATURES`, map-style.
        fraction: of every data set's patients; 0 draws none.
        seed: of the choice.
        beside: training and validation rows of other data, of either kind: conversations about an image, or a patient
            of a data set, that is on one side there come on the same.

    Raises:
        ValueError: see `splits.hold_out`; `beside` others, nothing need be left to hold out.
    """
    naming = ImageNames(any(map(has_embedded, (rows, *chain(*beside)))))
    names = list(naming.of_rows(rows))
    images, patients = _Union(), _Union()
    owners: dict[str, str] = {}  # image -> one of its patients
    for some in names:
        for name in some:
            images.join(some[0], name)
    members = []
    origin = rows.select_columns(["dataset", "patient", "modality"])
    for position, (row, some) in enumerate(zip(origin, names, strict=True)):
        image = images.first(some[0]) if some else f"row {position:09d}"
        patient = _patient(row) or image
        patients.join(owners.setdefault(image, patient), patient)
        members.append(Member(row["dataset"] or "", patient, row["modality"] or "", image))
    members = [member._replace(patient=patients.first(member.patient)) for member in members]
    of_images, of_patients = _sides(beside, naming, images, patients)
    sides: dict[str, bool] = {}  # of images; what anything holds out is held out
    for member in members:
        for side in (of_images.get(member.image), of_patients.get(member.patient)):
            if side is not None:
                sides[member.image] = sides.get(member.image, False) or side
    free = [position for position, member in enumerate(members) if member.image not in sides]
    drawn = {free[place] for place in hold_out([members[i] for i in free], fraction, seed, required=not beside)}
    left = {members[i][:2] for i in free if i not in drawn}  # a volume may be left in part
    whole = {members[i].patient for i in drawn if members[i][:2] not in left}
    drawn |= {i for i in free if members[i].patient in whole}
    held = drawn | {position for position, member in enumerate(members) if sides.get(member.image)}
    if fraction and not held:
        logger.warning("all conversations are about images or patients whose masks are trained on: none is held out")
    return held


def _patient(row: dict[str, Any]) -> str | None:
    """A name of a row's patient that no other data set has."""
    return f"{row['dataset'] or ''}\0{row['patient']}" if row["patient"] else None


def _sides(
    beside: Sequence[tuple["Dataset", "Dataset"]], naming: "ImageNames", images: "_Union", patients: "_Union"
) -> tuple[dict[str, bool], dict[str, bool]]:
    """Whether an image, and a patient who is on one side alone, is held out in other data."""
    of_images: dict[str, bool] = {}
    of_patients: dict[str, set[bool]] = defaultdict(set)
    for held, rows in chain(*map(enumerate, beside)):
        for row, names in zip(rows.select_columns(["dataset", "patient"]), naming.of_rows(rows), strict=True):
            for image in map(images.first, names):
                of_images[image] = of_images.get(image, False) or bool(held)
            if patient := _patient(row):
                of_patients[patients.first(patient)].add(bool(held))
    return of_images, {patient: found.pop() for patient, found in of_patients.items() if len(found) == 1}


class _Union:
    """Names joined into sets; a set is called by the first of its names, whatever the order of joining."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def first(self, name: str) -> str:
        while (parent := self._parents.get(name, name)) != name:
            self._parents[name] = self._parents.get(parent, parent)
            name = parent
        return name

    def join(self, one: str, other: str) -> None:
        low, high = sorted((self.first(one), self.first(other)))
        self._parents[high] = low


class ImageNames:
    """What tells images apart: their absolute paths, or their content, named by the first path that it was met at.

    Args:
        by_content: read all images; one that cannot be read goes by its path.
    """

    def __init__(self, by_content: bool) -> None:
        self.by_content = by_content
        self._named: dict[bytes, str] = {}

    def of_rows(self, rows: "Dataset") -> Iterator[list[str]]:
        """The names of each row's images, of either kind of rows."""
        column = _image_column(rows)
        for batch in rows.select_columns([column]).with_format("arrow").iter(batch_size=100):
            for some in batch[column].to_pylist():
                yield [self._name(entry) for entry in (some or [] if column == "images" else [some])]

    def _name(self, entry: dict[str, Any]) -> str:
        content = entry.get("bytes")
        path = entry["path"] if content is not None else os.path.abspath(entry["path"])
        if not self.by_content:
            return path
        try:
            content = Path(path).read_bytes() if content is None else content
        except OSError:
            return path
        return self._named.setdefault(hashlib.sha256(content).digest(), f"{path}\0{len(self._named)}")


def has_embedded(rows: "Dataset") -> bool:
    """Whether any image of the rows is embedded; none is read."""
    import pyarrow.compute as pc

    column = _image_column(rows)
    for batch in rows.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        pictures = batch[column].combine_chunks()
        pictures = pc.list_flatten(pictures) if column == "images" else pictures
        if pc.any(pc.is_valid(pc.struct_field(pictures, "bytes"))).as_py():
            return True
    return False


def _image_column(rows: "Dataset") -> str:
    return "image" if "image" in rows.column_names else "images"
