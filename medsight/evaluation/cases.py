"""Rows of data sets as cases of a benchmark: prompt, pictures, reference answer, reference masks."""

import functools
import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from medsight.data.schema import IMAGE_MARKER
from medsight.data.templates import Wordings


CLOSED, OPEN = "CLOSED", "OPEN"


@dataclass(frozen=True)
class Case:
    """One row of a benchmark.

    Example:
        >>> picture = {"path": "a.png", "bytes": None}
        >>> case = Case("a.png#liver", "<image>\\nSegment the liver.", (picture,), target="liver")
        >>> case.absent, case.masks
        (False, ())
    """

    id: str  # unique in its benchmark, and the same wherever the data lies
    prompt: str  # the user's words; "<image>" stands for the next of the images
    images: tuple[dict[str, Any], ...]  # pictures, `{"path", "bytes"}`, as the masks
    answer: str | None = None  # the reference answer, for questions and diagnoses
    answer_type: str | None = None  # "CLOSED" or "OPEN", for questions and diagnoses
    options: tuple[str, ...] = ()  # what can be chosen from, in multiple choice
    target: str | None = None  # the structure asked for, or that shows the diagnosis; several structures in words
    absent: bool = False  # whether the right answer has no mask
    masks: tuple[dict[str, Any], ...] = ()  # reference masks of the target; several where it has several parts
    mask_targets: tuple[str, ...] = ()  # what each mask shows, where an answer's masks are told apart by name
    codes: tuple[str, ...] | None = None  # of each mask, where the data set gives them, as `medsight data annotate`
    spacing_mm: tuple[float, float] | None = None  # (row, column) size of a pixel in millimetres, where known
    dataset: str = "-"
    modality: str = "-"
    site: str = "-"
    patient: str | None = None  # the image where the data name no patient, None where they name neither
    label_origin: str | None = None  # "expert", "model", ..., where known


class Words(NamedTuple):
    """How prompts are made: the declaration's template, or a held-out wording drawn by the row's id.

    Example:
        >>> Words("Segment the {target}.").prompt("a.png#liver", {"target": "liver"})
        '<image>\\nSegment the liver.'
    """

    template: str  # with {target}, {modality}, {site} or {question} in braces
    held_out: tuple[str, ...] = ()  # other templates, of which each row gets one
    seed: int = 0

    def prompt(self, identity: str, fields: Mapping[str, str], images: int = 1) -> str:
        """The prompt of a row with so many images, which come first unless the fields place them."""
        template = self.template
        if self.held_out:
            template = random.Random(f"{self.seed}:{identity}").choice(self.held_out)
        text = template.format(**fields)
        placed = text.count(IMAGE_MARKER)
        return "".join([f"{IMAGE_MARKER}\n"] * (images - placed)) + text


def fingerprint(cases: Sequence[Case]) -> str:
    """A sha256 of all that cases say and of the files they name, wherever these lie."""
    digest = hashlib.sha256()
    for case in cases:
        described = {
            name: [_picture(entry) for entry in value] if name in ("images", "masks") else value
            for name, value in vars(case).items()
        }
        digest.update(json.dumps(described, sort_keys=True).encode())
    return digest.hexdigest()


def _picture(entry: Mapping[str, Any]) -> Any:
    if entry.get("bytes") is not None:
        return hashlib.sha256(entry["bytes"]).hexdigest()
    file = Path(entry["path"])
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else file.name


def relative(path: str | Path, root: Path) -> str:
    """A path below the data's folder as ids name it, with slashes; others by their last three parts; without "..".

    The name of an embedded picture, which is no file's, stays what it is: it must not depend on the working folder.
    """
    root = Path(os.path.abspath(root if root.is_dir() else root.parent))
    absolute = Path(os.path.abspath(path))
    if absolute.is_relative_to(root):
        return absolute.relative_to(root).as_posix()
    if not os.path.isabs(path) and not os.path.exists(path):
        return "/".join(part for part in Path(os.path.normpath(path)).parts if part != "..")
    return "/".join(absolute.parts[1:][-3:])


def origin_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a case that say where its row comes from; "-" for data set, modality or site that is unknown."""
    known = {name: row.get(name) or "-" for name in ("dataset", "modality", "site")}
    return {**known, "patient": row.get("patient"), "label_origin": row.get("label_origin")}


@functools.cache
def wordings() -> Wordings:
    """The shipped wordings, read once."""
    return Wordings.load()
