"""All layouts' rows as one data set, map-style or streamed."""

import dataclasses
import glob
import hashlib
import inspect
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsight.text import first_few

from .records import JSON_SUFFIXES, json_records, parquet_records
from .registry import Entry, Source, find_layout, layout_names
from .schema import CONVERSATION_FEATURES, REGION_FEATURES
from .splits import picture_names
from .templates import read_yaml


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = [
    *("Source", "detect_layout", "find_layout", "find_source", "iterate", "kind_of", "load_source", "nothing_found"),
    "warn_of_shared_pictures",
]

logger = logging.getLogger(__name__)

_NO_DATA = ("annotation.json",)  # what `medsight data annotate` says of the parquet files beside it


def kind_of(source: Source) -> str:
    """Which kind of rows a source has, "regions" or "conversations"; a file is opened where its layout holds either.

    Raises:
        OSError, ValueError: that file is missing or damaged.
    """
    layout = find_layout(source.layout)
    return layout.kind if isinstance(layout.kind, str) else layout.kind(layout.shards(source)[0])


def iterate(source: Source) -> Iterator[Entry]:
    """Every wanted row of a source, one after another, and every bad one as an entry with its error.

    Raises:
        OSError, ValueError: the source's files are not there, or not in its layout.
    """
    yield from _entries(source, survey(source))


def _entries(source: Source, known: "Survey") -> Iterator[Entry]:
    entries = (entry for shard in known.shards for entry in read_shard(shard, source, known))
    yield from islice(entries, source.limit)


@dataclasses.dataclass(frozen=True)
class Survey:
    """What must be known of a whole source before its first row can be given.

    Attributes:
        shards: its files or folders.
        structures: the structures that have a mask anywhere, by data set, modality and site; of a source that is
            `complete`.
        tested: (data set, patient) of the split test; of a source with a `test_share`.
    """

    shards: list[str]
    structures: Mapping[tuple[str, ...], frozenset[str]] = dataclasses.field(default_factory=dict)
    tested: frozenset[tuple[str, str]] = frozenset()


def survey(source: Source) -> Survey:
    """Read a source once for what its `complete` and `test_share` ask; of others its shards alone.

    Raises:
        OSError, ValueError: the source's files are not there, or not in its layout.
    """
    layout = find_layout(source.layout)
    everything = dataclasses.replace(source, split=None, where=None, limit=None)
    if not source.complete and source.test_share is None:
        return Survey(layout.shards(source))
    shards = layout.shards(everything)
    structures, patients = defaultdict[tuple[str, ...], set[str]](set), set[tuple[str, str]]()
    for entry in (entry for shard in shards for entry in layout.rows(shard, everything)):
        if entry.row is not None:
            row = _renamed(entry.row, source)
            structures[_series(row)] |= {*row["targets"]}
            patients.add(_patient(row))
    share = source.test_share or 0.0
    shuffled = sorted(patients, key=lambda patient: hashlib.sha256("\0".join(patient).encode()).digest())
    tested = shuffled[: min(len(patients) - 1, max(1, round(share * len(patients))))] if share else []
    found = {series: frozenset(names) for series, names in structures.items()} if source.complete else {}
    return Survey(shards, found, frozenset(tested))


def read_shard(shard: str, source: Source, known: Survey) -> Iterator[Entry]:
    """The entries of a shard, with what the source says of its rows: names, coverage, split."""
    asked = source if source.test_share is None else dataclasses.replace(source, split=None)
    for entry in find_layout(source.layout).rows(shard, asked):
        row = entry.row
        if row is None:
            yield entry
            continue
        row = _renamed(row, source)
        if source.test_share is not None:
            row["split"] = "test" if _patient(row) in known.tested else "train"
            if source.split not in (None, row["split"]):
                continue
        if "absent" in row:
            looked_for = {*(source.covers or ())} | {*known.structures.get(_series(row), ())}
            row["absent"] = [*row["absent"], *sorted(looked_for - {*row["absent"]} - {*row["targets"]})]
        yield entry._replace(row=row)


def _renamed(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """A copy of a row with structures called as the source says."""
    names = source.rename or {}
    lists = {key: row[key] for key in ("targets", "absent") if key in row}
    return {**row, **{key: [names.get(name, name) for name in listed] for key, listed in lists.items()}}


def _patient(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["dataset"] or "", row["patient"] or ""


def _series(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["dataset"] or "", row["modality"] or "", row["site"] or ""


def warn_of_shared_pictures(source: Source) -> None:
    """Log a warning where pictures of a source's split are, byte for byte, in another of its splits too, and the data
    do not say so themselves.

    Raises:
        OSError, ValueError: as `iterate`.
    """
    if source.split is None:
        return
    everything = dataclasses.replace(source, split=None, limit=None)

    def pictures() -> Iterator[tuple[str, dict[str, Any]]]:
        for entry in iterate(everything):
            if entry.row is not None and not entry.known_leak:
                shown = [entry.row["image"]] if "image" in entry.row else entry.row["images"]
                yield from ((entry.row["split"], picture) for picture in shown)

    name_of, splits = picture_names(picture for _, picture in pictures()), defaultdict[str, set[str]](set)
    for split, picture in pictures():
        splits[name_of(picture)].add(split)
    shared = [name for name, found in splits.items() if len(found) > 1 and source.split in found]
    if shared:
        logger.warning(
            f"{source.path}: {len(shared):,} picture(s) of the split {source.split} are in another split too "
            f"({first_few(shared)}): a score on them is flattered; `medsight data check` lists them"
        )


def load_source(source: Source, streaming: bool = False, skip_errors: bool = False) -> "Dataset | IterableDataset":
    """The rows of a source, by `schema.REGION_FEATURES` or `schema.CONVERSATION_FEATURES` as `kind_of` says.

    Map-style rows lie in the cache of `datasets` (never beside the data) and are read again when the source's text
    files, or the readers, have changed; pictures in files of their own stay there. Streamed rows are not stored.

    Args:
        source: what to read.
        streaming: rows one after another, by shards (files), instead of map-style.
        skip_errors: leave bad rows out, each with a warning when it is read, instead of stopping at the first.

    Raises:
        OSError, ValueError: files are missing or not in the source's layout, a row is bad (its file and record are
            named), or there is no row of the split and with the wanted values. Streamed bad rows raise when reached.
    """
    from datasets import Dataset, IterableDataset
    from datasets.exceptions import DatasetGenerationError

    source = dataclasses.replace(
        source,
        path=os.path.abspath(source.path),
        images=None if source.images is None else os.path.abspath(source.images),
    )
    features = REGION_FEATURES if kind_of(source) == "regions" else CONVERSATION_FEATURES
    known = survey(source)
    if next(_entries(source, known), None) is None:
        raise ValueError(nothing_found(source))
    arguments = {"shards": known.shards, "source": source, "known": known, "columns": tuple(features)}
    arguments |= {"stamp": _stamp(known.shards, source), "skip_errors": skip_errors}
    if streaming:
        stream = IterableDataset.from_generator(_rows, features=features, gen_kwargs=arguments)
        return stream if source.limit is None else stream.take(source.limit)
    try:
        rows = Dataset.from_generator(_rows, features=features, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise
    if not len(rows):
        raise ValueError(f"{source.path}: all of its rows are bad, and were left out")
    return rows if source.limit is None else rows.select(range(min(source.limit, len(rows))))


def _rows(
    shards: list[str], source: Source, known: Survey, columns: tuple[str, ...], stamp: str, skip_errors: bool
) -> Iterator[dict[str, Any]]:
    """The generator behind the data sets; `stamp` makes the cache of `datasets` forget rows of changed files."""
    for shard in shards:
        for entry in islice(read_shard(shard, source, known), source.limit):
            for warning in entry.warnings:
                logger.warning(warning)
            if entry.row is not None:
                yield {name: entry.row[name] for name in columns}
            elif skip_errors:
                logger.warning(f"left out: {entry.error}")
            elif entry.error is not None:
                raise entry.error


def _stamp(shards: list[str], source: Source) -> str:
    """A digest of the readers' code, and of the names, sizes and times of the shards' files or folders."""
    digest = hashlib.sha256()
    code = {*Path(__file__).parent.rglob("*.py"), Path(inspect.getfile(find_layout(source.layout).rows))}
    for file in filter(Path.is_file, sorted(code)):
        digest.update(file.read_bytes())
    for shard in map(Path, shards):
        inside = shard.glob("*")
        if find_layout(source.layout).embeds:
            root = Path(source.path)
            inside = (root if root.is_dir() else shard.parent).rglob("*")
        for file in (shard, *sorted(file for file in inside if find_layout(source.layout).embeds or file.is_dir())):
            status = file.stat()
            digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def nothing_found(source: Source) -> str:
    """What to say of a source without a row: what was asked for, and which splits there are."""
    everything = dataclasses.replace(source, split=None, where=None, limit=1000)
    there = ", ".join(sorted({entry.row["split"] for entry in iterate(everything) if entry.row})) or "no rows at all"
    wanted = f"of the split {source.split!r}" if source.split is not None else "there"
    if source.where:
        wanted += f" with {', '.join(f'{key} = {value!r}' for key, value in source.where.items())}"
    return f"{source.path}: no row {wanted}; its splits: {there}"


def find_source(path: str | Path, layout: str | None = None, **settings: Any) -> Source:
    """The source that a caller names by a path: an entry of a recipe in a YAML file of its own, or data.

    Args:
        path: a .yaml file, in which paths are relative to it; or a file, folder or pattern of files of data.
        layout: of data; by default what `detect_layout` finds.
        settings: further fields of `Source`, which go before those of a YAML file where they are not None.

    Raises:
        OSError, ValueError: the file cannot be read or is no such entry; or as `detect_layout`.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if Path(path).suffix not in (".yaml", ".yml"):
        return Source.from_mapping({"layout": layout or detect_layout(path), "path": str(path), **given})
    entry = read_yaml(Path(path))
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ValueError(f"{path}: expected the entry of a data source, with its layout and path, got {entry!r}")
    if layout is not None:
        raise ValueError(f"{path}: its layout stands in it ({entry.get('layout')}): leave {layout!r} out")
    entry["path"] = str(Path(path).parent / os.path.expanduser(entry["path"]))
    try:
        return Source.from_mapping({**entry, **given})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def detect_layout(path: str | Path) -> str:
    """The layout of a file or folder, by what is in it.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it looks like none of the layouts.
    """
    path = Path(path)
    if not path.exists():
        matching = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else []
        if not matching:
            raise FileNotFoundError(f"{path}: no such file or folder")
        return detect_layout(matching[0])
    names = layout_names()
    place, record = _first_record(path)
    for layout in map(find_layout, names):
        if layout.looks_like is not None and layout.looks_like(path, record):
            return layout.name
    if path.is_dir():
        for pattern in ("*.json", "*.jsonl", "**/*.parquet", "**/*.tar", "**/*.tar.gz", "**/*.tgz", "**/*.pkl"):
            for file in sorted(file for file in path.glob(pattern) if file.name not in _NO_DATA):
                return detect_layout(file)
    if record:
        raise ValueError(f"{place}: a record of fields {sorted(record)} fits none of the layouts; name its layout")
    raise ValueError(f"{path}: it looks like none of the layouts {', '.join(names)}; name its layout")


def _first_record(path: Path) -> tuple[str, dict[str, Any]]:
    """The first record of a JSON or parquet file, and its place; an empty one of other files and of folders."""
    if not path.is_file() or path.suffix not in (*JSON_SUFFIXES, ".parquet"):
        return str(path), {}
    read = parquet_records if path.suffix == ".parquet" else json_records
    place, record = next(read(path), (str(path), ValueError(f"{path}: an empty file")))
    if isinstance(record, ValueError):
        raise record
    return place, record
