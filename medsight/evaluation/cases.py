"""Rows of data sets as items of a benchmark: prompt, pictures, reference answer, reference masks."""

import functools
import hashlib
import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medsight.data.schema import IMAGE_MARKER


if TYPE_CHECKING:
    from medsight.evaluation.benchmarks import Benchmark


CLOSED, OPEN = "CLOSED", "OPEN"


@dataclass(frozen=True)
class Item:
    """One row of a benchmark.

    Attributes:
        id: unique in its benchmark, and the same wherever the data lies.
        prompt: the user's words; "<image>" stands for the next of the images.
        images: pictures, `{"path", "bytes"}`.
        answer: the reference answer, for questions and diagnoses.
        answer_type: "CLOSED" or "OPEN", for questions and diagnoses.
        options: what can be chosen from, in multiple choice, else empty.
        target: the structure asked for, or that shows the diagnosis; several structures in words.
        absent: whether the right answer has no mask.
        masks: reference masks of the target, pictures; several where it has several parts.
        mask_targets: what each mask shows, where an answer's masks are told apart by what it calls them; else empty.
        codes: the region codes that the data set itself gives to them, as `medsight data annotate` does; None where it
            gives none. They mean something within the codebook that wrote them alone.
        spacing_mm: (row, column) size of a pixel in millimetres, where known.
        dataset, modality, site: where the image comes from, where known.
        patient: whom it comes from; the image itself where the data name no patient, None where they name neither.
        label_origin: "expert", "model", ..., where known.
    """

    id: str
    prompt: str
    images: tuple[dict[str, Any], ...]
    answer: str | None = None
    answer_type: str | None = None
    options: tuple[str, ...] = ()
    target: str | None = None
    absent: bool = False
    masks: tuple[dict[str, Any], ...] = ()
    mask_targets: tuple[str, ...] = ()
    codes: tuple[str, ...] | None = None
    spacing_mm: tuple[float, float] | None = None
    dataset: str = "-"
    modality: str = "-"
    site: str = "-"
    patient: str | None = None
    label_origin: str | None = None


class Words(NamedTuple):
    """How prompts are made: the declaration's template, or a held-out wording drawn by the row's id.

    Attributes:
        template: with {target}, {modality}, {site} or {question} in braces.
        held_out: other templates, of which each row gets one; none uses the declaration's.
        seed: of that choice.
    """

    template: str
    held_out: tuple[str, ...] = ()
    seed: int = 0

    def prompt(self, identity: str, fields: Mapping[str, str], images: int = 1) -> str:
        """The prompt of a row with so many images, which come first unless the fields place them."""
        template = self.template
        if self.held_out:
            template = random.Random(f"{self.seed}:{identity}").choice(self.held_out)
        text = template.format(**fields)
        placed = text.count(IMAGE_MARKER)
        return "".join([f"{IMAGE_MARKER}\n"] * (images - placed)) + text


class NoRowsError(ValueError):
    """The data hold no row that a benchmark asks about."""


def read_items(
    benchmark: "Benchmark", path: str | Path, held_out_prompts: bool = False, seed: int = 0
) -> tuple[list[Item], int]:
    """All items of a benchmark, in the order of its files; pictures are opened where an answer lies in them alone.

    Args:
        path: the folder, or file, with the benchmark's data.
        held_out_prompts: ask in wordings that training never saw, where the benchmark has an intent.
        seed: of the choice among them.

    Returns:
        The items, and how many files they came from.

    Raises:
        FileNotFoundError: the data is not there; see `Benchmark.check_present`.
        NoRowsError: there is no row for it.
        ValueError: a row is bad, two rows have one id, or there are no held-out wordings for this benchmark.
    """
    from medsight.evaluation.readers import READERS

    path = Path(path)
    benchmark.check_present(path)
    held_out: tuple[str, ...] = ()
    if held_out_prompts:
        held_out = held_out_wordings(benchmark)
    items, shards = READERS[benchmark.layout](benchmark, path, Words(benchmark.prompt, held_out, seed))
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{path}: two rows have the id {item.id!r}")
        seen.add(item.id)
    if not items:
        raise NoRowsError(f"{path}: no row of the split {benchmark.split!r} for the benchmark {benchmark.name}")
    return items, shards


def held_out_wordings(benchmark: "Benchmark") -> tuple[str, ...]:
    """The wordings of a benchmark's intent that training never uses.

    Raises:
        ValueError: the benchmark asks the data's own questions.
    """
    if benchmark.intent is None:
        raise ValueError(f"benchmark {benchmark.name} asks the data's own questions: it has no held-out prompts")
    return tuple(wordings().held_out_prompts[benchmark.intent])


def fingerprint(items: list[Item]) -> str:
    """A sha256 of all that items say and of the files they name, wherever these lie."""
    digest = hashlib.sha256()
    for item in items:
        described = {
            name: [_picture(entry) for entry in value] if name in ("images", "masks") else value
            for name, value in vars(item).items()
        }
        digest.update(json.dumps(described, sort_keys=True).encode())
    return digest.hexdigest()


def _picture(entry: Mapping[str, Any]) -> Any:
    if entry.get("bytes") is not None:
        return hashlib.sha256(entry["bytes"]).hexdigest()
    file = Path(entry["path"])
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else file.name


def relative(path: str | Path, root: Path) -> str:
    """A path below the data's folder as ids name it, with slashes; others by their last three parts; without ".."."""
    root = Path(os.path.abspath(root if root.is_dir() else root.parent))
    absolute = Path(os.path.abspath(path))
    if absolute.is_relative_to(root):
        return absolute.relative_to(root).as_posix()
    return "/".join(absolute.parts[1:][-3:])


def origin_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an item that say where its row comes from; "-" for data set, modality or site that is unknown."""
    known = {name: row.get(name) or "-" for name in ("dataset", "modality", "site")}
    return {**known, "patient": row.get("patient"), "label_origin": row.get("label_origin")}


@functools.cache
def wordings() -> Any:
    """The shipped wordings, read once."""
    from medsight.data.templates import Wordings

    return Wordings.load()
