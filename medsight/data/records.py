"""What layouts share: records of JSON and parquet files, one at a time, their fields, and rows made of them."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import Any

from configuration_medsight.configuration_medsight import ORIENTATION
from medsight.text import nearest

from .registry import Entry, Source
from .splits import canonical_split


# Of all pictures that are read, see `processing_medsight.image_loading_medsight`.
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpx"),
)
JSON_SUFFIXES = (".json", ".jsonl")

# A file and record, and the record itself, or what is wrong with it.
Record = tuple[str, dict[str, Any] | ValueError]


def json_records(path: str | Path) -> Iterator[Record]:
    """The objects of a JSON file, one at a time: one a line, or those of one array.

    A line that is no JSON object is yielded as an error, and the next line follows; a damaged array ends there.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = next(filter(str.strip, file), "")
            file.seek(0)
            if first.lstrip().startswith("["):
                yield from _array(path, file.read())
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield json_object(f"{path}, line {number}", line)
    except UnicodeDecodeError as error:
        yield str(path), ValueError(f"{path}: expected UTF-8 text ({error})")


def json_object(place: str, text: str | bytes) -> Record:
    """The object of a text, or what is wrong with it."""
    try:
        return _checked(place, json.loads(text))
    except (ValueError, RecursionError) as error:
        return place, ValueError(f"{place}: not a JSON object ({error})")


def _checked(place: str, record: Any) -> Record:
    if not isinstance(record, dict):
        return place, ValueError(f"{place}: expected a JSON object, got {type(record).__name__}")
    return place, record


def _array(path: Path, text: str) -> Iterator[Record]:
    decoder, gap, end = json.JSONDecoder(), re.compile(r"[\s,]*"), text.index("[") + 1
    for number in count(1):
        start = gap.match(text, end).end()  # type: ignore[union-attr]  # nothing is a gap too
        if text.startswith("]", start):
            return
        place = f"{path}, item {number}"
        try:
            record, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            yield place, ValueError(f"{place}: the JSON array is damaged or cut short there ({error.msg})")
            return
        yield _checked(place, record)


def parquet_records(path: str | Path) -> Iterator[Record]:
    """The rows of a parquet file, a few at a time; a damaged file ends with an error."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except pyarrow.ArrowException as error:
        yield str(path), ValueError(f"{path}: not a parquet file, or a damaged one, after row {number} ({error})")


def convert(
    records: Iterable[Record],
    source: Source,
    split: str | None,
    row_of: Callable[[dict[str, Any], str, str], dict[str, Any]],
) -> Iterator[Entry]:
    """Entries of the records that a source takes.

    Args:
        split: of records that tell none; None where files do not tell either, and all are of the source's split.
        row_of: the row of a record, its place, for errors, and its split; raises ValueError for a bad one, or OSError
            where a file that it names cannot be read.
    """
    for place, record in records:
        if isinstance(record, ValueError):
            yield Entry(place, error=record)
            continue
        try:
            known = record.get("split") or split
            if source.takes(record, known):
                row = row_of(record, place, canonical_split(known or source.split or "train"))
                yield Entry(place, row, known_leak=record.get("image_in_test") is True)
        except ValueError as error:
            yield Entry(place, error=error)
        except OSError as error:  # a file that a record names is missing
            yield Entry(place, error=ValueError(f"{place}: {error}"))


def picture(path: str | Path) -> dict[str, Any]:
    """What a row holds for an image or a mask in a file of its own."""
    return {"path": str(path), "bytes": None}


class UntoldError(ValueError):
    """Files do not tell something that is needed, and the source does not say it either.

    Attributes:
        setting: of the source, which would say it: "modality", "site", "structure" or "names".

    Example:
        >>> UntoldError("a.png: say modality: NAME", "modality").setting
        'modality'
    """

    def __init__(self, message: str, setting: str) -> None:
        super().__init__(message)
        self.setting = setting


def told_by_source(source: Source, name: str, place: str) -> str:
    """The modality or site that a source says its images have, of a layout that does not tell.

    Raises:
        UntoldError: the source does not say either.
    """
    value: str | None = getattr(source, name)
    if value is None:
        message = f"{place}: the layout {source.layout} does not tell the {name} of images: say {name}: NAME"
        raise UntoldError(message, name)
    return value


def path_inside(folder: str | Path, name: Any, place: str) -> Path:
    """The path of a file that data name, relative to a folder.

    Raises:
        ValueError: it is no text, or leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{place}: expected the path of a file, got {name!r}")
    path = Path(os.path.normpath(Path(folder) / name))
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise ValueError(
            f"{place}: {name!r} leads out of {folder}: name the folder that paths start from (images: DIR)"
        )
    return path


def patient_of(value: Any) -> str | None:
    """A record's patient as text, also one that is numbered 0; None where it names none."""
    return None if value is None or value == "" else str(value)


def required(record: dict[str, Any], place: str, *names: str) -> Any:
    """The first of these fields that a record has; raises ValueError, saying what it has, if there is none."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise ValueError(f"{place}: expected a field {' or '.join(map(repr, names))}, got {sorted(record)}")


def refuse_misspelt(record: Mapping[str, Any], known: Set[str], place: str) -> None:
    """Raises ValueError naming an unknown field that is spelled nearly as a known one that the record lacks."""
    for name in record.keys() - known:
        if get_close_matches(name, known - record.keys(), 1, cutoff=0.8):
            raise ValueError(f"{place}: the field {name!r} is unknown, and not used: {nearest(name, known)}")


def as_text(value: Any, place: str, name: str) -> str:
    """A field's value as text; numbers become text, and anything else, or an empty text, raises ValueError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: expected text in {name!r}, got {value!r}")
    return value


def check_regions(row: dict[str, Any], place: str) -> None:
    """Raises ValueError naming `place` if the masks, targets and absent structures of an image do not go together, or
    its orientation is none."""
    masks, targets, orientation = row["masks"], row["targets"], row["orientation"]
    if orientation is not None and not (isinstance(orientation, str) and ORIENTATION.fullmatch(orientation)):
        raise ValueError(
            f"{place}: 'orientation' is {orientation!r}: expected what is at the right and at the bottom of the "
            "image, two letters of L, R, A, P, S and I, such as LP"
        )
    if len(masks) != len(targets):
        raise ValueError(f"{place}: {len(masks)} mask(s) for {len(targets)} target(s)")
    both = sorted(set(targets) & set(row["absent"]))
    if both:
        raise ValueError(f"{place}: {both[0]!r} has a mask and is said to be absent")
    files = [mask["path"] for mask in masks if mask["bytes"] is None]
    twice = [path for path in files if files.count(path) > 1]
    if twice:
        raise ValueError(f"{place}: the mask {twice[0]} is named {files.count(twice[0])} times")
