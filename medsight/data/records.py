"""What the readers share: records of JSON and parquet files, one at a time, and the files that a source has."""

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .splits import split_in_name


if TYPE_CHECKING:
    from .sources import Source

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
JSON_SUFFIXES = (".json", ".jsonl")
_CHUNK = 2**20  # characters read at a time


def patient_of(value: Any) -> str | None:
    """A record's patient as text, also one that is numbered 0; None where it names none."""
    return None if value is None or value == "" else str(value)


class Item(NamedTuple):
    """One row of a source, or why there is none: the caller raises the error, or reports it.

    Attributes:
        place: file and item that it came from.
        row: the row, by `schema.REGION_FEATURES` or `schema.CONVERSATION_FEATURES`.
        error: what is wrong with it; the row is None then.
        known_leak: whether the source itself says that this patient or image is also in another split.
    """

    place: str
    row: dict[str, Any] | None = None
    error: ValueError | None = None
    known_leak: bool = False


# A file and item, and the record there, or what is wrong with it.
Record = tuple[str, dict[str, Any] | ValueError]


def json_records(path: str | Path) -> Iterator[Record]:
    """The objects of a JSON file, one at a time: one a line, or one array that is never held whole.

    A line that is no JSON object is yielded as an error, and the next line follows; a damaged array ends there.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = file.read(_CHUNK)
            if start.lstrip().startswith("["):
                yield from _array(path, start, file.read)
                return
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _object(f"{path}, line {number}", line)
    except UnicodeDecodeError as error:
        yield str(path), ValueError(f"{path}: expected UTF-8 text ({error})")


def _object(place: str, text: str) -> Record:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        return place, ValueError(f"{place}: not a JSON object ({error})")
    return _checked(place, record)


def _checked(place: str, record: Any) -> Record:
    if not isinstance(record, dict):
        return place, ValueError(f"{place}: expected a JSON object, got {type(record).__name__}")
    return place, record


def _array(path: Path, text: str, read: Callable[[int], str]) -> Iterator[Record]:
    decoder, chunk = json.JSONDecoder(), _CHUNK
    text, number = text.lstrip()[1:], 0
    while True:
        text = text.lstrip()
        if number and text.startswith(","):
            text = text[1:].lstrip()
        if text.startswith("]"):
            return
        try:
            record, end = decoder.raw_decode(text)
        except json.JSONDecodeError as error:
            more = read(chunk)
            if not more:
                where = f"{path}, item {number + 1}"
                yield where, ValueError(f"{where}: the JSON array is damaged or cut short there ({error.msg})")
                return
            text, chunk = text + more, chunk * 2  # an item longer than a chunk is not parsed again for every chunk
            continue
        number, text, chunk = number + 1, text[end:], _CHUNK
        yield _checked(f"{path}, item {number}", record)


def parquet_records(path: str | Path, columns: list[str] | None = None) -> Iterator[Record]:
    """The rows of a parquet file, a few at a time; a damaged file ends with an error."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except pyarrow.ArrowException as error:
        yield str(path), ValueError(f"{path}: not a parquet file, or a damaged one, after row {number} ({error})")


def convert(
    records: Iterable[Record],
    row_of: Callable[[dict[str, Any], str], dict[str, Any]],
    takes: Callable[[dict[str, Any]], bool],
    known_leak: Callable[[dict[str, Any]], bool] = lambda record: False,
) -> Iterator[Item]:
    """Items of the records that `takes` lets through; `row_of(record, place)` raises ValueError for a bad one."""
    for place, record in records:
        if isinstance(record, ValueError):
            yield Item(place, error=record)
            continue
        try:
            if takes(record):
                yield Item(place, row_of(record, place), known_leak=known_leak(record))
        except ValueError as error:
            yield Item(place, error=error)


def required(record: dict[str, Any], place: str, *names: str) -> Any:
    """The first of these fields that a record has; raises ValueError, saying what it has, if there is none."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise ValueError(f"{place}: expected a field {' or '.join(map(repr, names))}, got {sorted(record)}")


def as_text(value: Any, place: str, name: str) -> str:
    """A field's value as text; numbers become text, and anything else, or an empty text, raises ValueError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: expected text in {name!r}, got {value!r}")
    return value


def check_regions(row: dict[str, Any], place: str) -> None:
    """Raises ValueError naming `place` if the masks, targets and absent structures of an image do not go together."""
    masks, targets = row["masks"], row["targets"]
    if len(masks) != len(targets):
        raise ValueError(f"{place}: {len(masks)} mask(s) for {len(targets)} target(s)")
    both = sorted(set(targets) & set(row["absent"]))
    if both:
        raise ValueError(f"{place}: {both[0]!r} has a mask and is said to be absent")
    files = [mask["path"] for mask in masks if mask["bytes"] is None]
    twice = [path for path in files if files.count(path) > 1]
    if twice:
        raise ValueError(f"{place}: the mask {twice[0]} is named {files.count(twice[0])} times")


def source_files(source: "Source", suffixes: tuple[str, ...], recursive: bool = False) -> list[str]:
    """The files of a source whose path is a file, a folder or a pattern of files, in order.

    In a folder, and of those that match a pattern, files named after a split (`train.json`, `data/test-00000.parquet`,
    `val/x.tar`) are of that split. A file that is named itself is read whatever it is called.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: no file has one of the suffixes or is of the split, or just some files are named after a split.
    """
    path = Path(source.path)
    wanted = " or ".join(suffixes)
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        files = sorted(str(file) for file in path.glob("**/*" if recursive else "*") if file.name.endswith(suffixes))
        if not files:
            raise ValueError(f"{path}: expected {wanted} files in this folder, found none")
    elif glob.has_magic(source.path):
        files = sorted(name for name in glob.glob(source.path, recursive=True) if name.endswith(suffixes))
        if not files:
            raise ValueError(f"{path}: no {wanted} file matches")
    else:
        raise FileNotFoundError(f"{path}: no such file or folder")
    splits = {file: split_of(file, source) for file in files}
    unnamed = [file for file in files if splits[file] is None]
    if len(unnamed) == len(files):
        return files
    if unnamed:
        raise ValueError(
            f"{unnamed[0]}: its name tells no split, while {len(files) - len(unnamed)} other files of {path} are "
            "named after one; name a file as the path, or a pattern that leaves the one or the other out"
        )
    chosen = [file for file in files if source.split in (None, splits[file])]
    if not chosen:
        raise ValueError(f"{path}: no file of the split {source.split!r}, only of {sorted(set(splits.values()))}")
    return chosen


def split_of(shard: str, source: "Source") -> str | None:
    """The split that a file of a source's folder or pattern is named after, in what the source's path leaves open."""
    if os.path.isfile(source.path):
        return None
    fixed = takewhile(lambda part: os.path.isdir(source.path) or not glob.has_magic(part), Path(source.path).parts)
    return split_in_name(Path(shard).relative_to(Path(*fixed)))
