"""predictions.jsonl: one answer a line, with its codes and its masks as COCO run-length encodings.

Any system can write such a file. A line is a JSON object with `id` (the case's) and `answer`; and, where regions are
cited, `masks` (COCO RLE at the reference's size: {"size": [height, width], "counts": text}), with `codes`, `groups`,
`phrases` and `scores` of the same length where the system has them. A system with a codebook may add what that calls
the reference masks, `reference_codes`, and the code group that it takes the image for, `group`; any system
may say whether its answer came to an end, `is_complete`.
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import numpy as np

from medsight.data.records import json_records
from medsight.text import first_few
from processing_medsight.region_codes_medsight import REGION_CODE


# The fields of a line that are checked: the kind of a value, or of each entry of a list, and what it is called.
_VALUES = {
    "id": (str, "text"),
    "answer": (str, "text"),
    "raw_text": (str, "text"),
    "group": (str, "text"),
    "is_complete": (bool, "true or false"),
}
_LISTS: dict[str, tuple[Any, str]] = {
    "masks": (object, "a mask"),
    "codes": (str, "text"),
    "groups": (str, "text"),
    "phrases": (str, "text"),
    "scores": ((int, float), "numbers"),
    "reference_codes": (str, "text"),
}
_REQUIRED = ("id", "answer", "codes", "reference_codes")  # others may be null, as may be an entry of theirs
# Characters 48 ('0') to 111 ('o') carry five bits and a sign of continuation each; a run takes at most seven.
_COUNTS = re.compile(r"(?:[P-o]{0,6}[0-O])+")


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Example:
        >>> Prediction.from_mapping({"id": "a.png#liver", "answer": "Here it is."}, "line 1").masks
        ()
    """

    id: str  # of the case
    answer: str  # clean text, without region codes
    raw_text: str = ""  # as generated, codes included; the answer where the system has none
    masks: Sequence[Mapping[str, Any]] = ()  # COCO RLE, one a cited region
    codes: Sequence[str] = ()  # of each mask, as the next three, where the system knows them
    groups: Sequence[str | None] = ()
    phrases: Sequence[str | None] = ()
    scores: Sequence[float | None] = ()
    group: str | None = None  # that the system takes the image for, by its own classifier
    reference_codes: Sequence[str] | None = None  # what its codebook gives to the reference masks; None where unknown
    is_complete: bool | None = None  # False where a limit of length cut the answer; None where unknown

    @classmethod
    def from_mapping(cls, record: Mapping[str, Any], place: str) -> "Prediction":
        """The prediction that a line holds; masks stay encoded and are checked when they are decoded.

        Raises:
            ValueError: a field is missing or of the wrong kind; the message begins with `place`.
        """
        given: dict[str, Any] = {name: record.get(name) for name in _VALUES}
        listed: dict[str, Any] = {name: record[name] for name in _LISTS if record.get(name) is not None}
        for name, values in listed.items():
            if not isinstance(values, list):
                raise ValueError(f"{place}: expected a list in {name!r}, got {type(values).__name__}")
            masks = len(listed.get("masks", ()))
            if name != "reference_codes" and len(values) not in (0, masks):
                raise ValueError(f"{place}: {len(values)} {name} for {masks} masks")
        for name, (kind, called) in (_VALUES | _LISTS).items():
            for value in listed.get(name, ()) if name in _LISTS else [given[name]]:
                if not isinstance(value, kind) and (value is not None or name in _REQUIRED):
                    raise ValueError(f"{place}: expected {called} in {name!r}, got {value!r}")
        for name in ("codes", "reference_codes"):
            for code in listed.get(name, ()):
                if not REGION_CODE.fullmatch(code):
                    raise ValueError(f"{place}: {name}: {code!r} is not a region code")
        given |= {name: tuple(values) for name, values in listed.items()}
        given["raw_text"] = given["raw_text"] or given["answer"]
        return cls(**given)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A boolean (height, width) mask as COCO RLE: {"size": [height, width], "counts": text}."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def decode_mask(encoded: Any, name: str, size: tuple[int, int]) -> np.ndarray:
    """The boolean (height, width) mask of a COCO RLE, whose counts are text or a list of run lengths.

    Decoded here, because pycocotools reads past the end of damaged counts; and of the `size` asked for alone, because
    a file can name one that fills the memory. `name` is what an error calls the mask.

    Raises:
        ValueError: it is malformed, its runs do not fill its size, or that is not the (height, width) asked for.
    """
    if not isinstance(encoded, Mapping) or set(encoded) != {"size", "counts"}:
        raise ValueError(f"{name}: expected COCO RLE with size and counts, got {shortened(encoded)}")
    shape, counts = encoded["size"], encoded["counts"]
    if not (isinstance(shape, (list, tuple)) and len(shape) == 2 and all(_is_count(side) and side for side in shape)):
        raise ValueError(f"{name}: expected size [height, width] of at least 1 each, got {shortened(shape)}")
    height, width = shape
    if (height, width) != tuple(size):
        raise ValueError(
            f"{name}: the mask is {height} x {width} pixels (height x width), its image {size[0]} x {size[1]}"
        )
    if isinstance(counts, list):
        runs = counts if all(map(_is_count, counts)) else None
    else:
        runs = _runs(counts) if isinstance(counts, str) and _COUNTS.fullmatch(counts) else None
    if runs is None or min(runs, default=-1) < 0 or sum(runs) != height * width:
        raise ValueError(f"{name}: malformed RLE, does not fill {height} x {width} pixels ({shortened(counts)})")
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _runs(counts: str) -> list[int]:
    """Run lengths of COCO's compressed counts: five bits a character, differences from the third run on."""
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode("ascii"):
        bits = character - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def append_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Add predictions to a file, and wait until they are on the disk, so that a kill loses none of them."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(to_line, predictions))
        file.flush()
        os.fsync(file.fileno())


def to_line(prediction: Prediction) -> str:
    """A line of predictions.jsonl."""
    return json.dumps(asdict(prediction), ensure_ascii=False) + "\n"


def drop_partial_line(path: Path) -> None:
    """Cut what follows the last line end of a file, which a kill left; there may be no file."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end, found = file.seek(0, os.SEEK_END), -1
        while end and found < 0:
            start = max(0, end - 2**16)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            end = start + found + 1
        file.truncate(end)


def read_predictions(path: Path) -> Iterator[tuple[str, Prediction]]:
    """Each line's place and prediction; a line that is none raises ValueError, naming file and line."""
    for place, record in json_records(path):
        if isinstance(record, ValueError):
            raise record
        yield place, Prediction.from_mapping(record, place)


@dataclass
class Problems:
    """What is wrong with predictions: ids by kind, with a reason where one helps.

    Example:
        >>> Problems(missing=["a.png"]).to_text()
        '1 missing (a.png)'
    """

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)  # malformed, or not of the reference's size
    empty: list[str] = field(default_factory=list)  # answers without a word

    def refused(self) -> dict[str, list[str]]:
        """Those that stop the scoring unless they are accepted; an empty answer is scored as it is."""
        return {kind: ids for kind, ids in asdict(self).items() if ids and kind != "empty"}

    def to_text(self, shown: int = 5) -> str:
        """Counts, and the first few of each kind."""
        found = self.refused().items()
        return ", ".join(f"{len(ids):,} {kind} ({first_few(ids, shown, '; ')})" for kind, ids in found)


def match_predictions(
    ids: Sequence[str], predictions: Iterable[tuple[str, Prediction]], left_out: Collection[str] = ()
) -> tuple[dict[str, Prediction], Problems]:
    """The first prediction of each case, and what does not match; those of `left_out` cases are passed over."""
    problems, known = Problems(), set(ids)
    found: dict[str, Prediction] = {}
    for place, prediction in predictions:
        if prediction.id in left_out:
            continue
        if prediction.id not in known or prediction.id in found:
            wrong = problems.duplicate if prediction.id in found else problems.extra
            wrong.append(f"{prediction.id} ({place.rpartition(', ')[2]})")
        else:
            found[prediction.id] = prediction
            if not prediction.answer.strip():
                problems.empty.append(prediction.id)
    problems.missing = [identity for identity in ids if identity not in found]
    return found, problems
