"""Rows in parquet files of this package's own schema, as `medsight data annotate` and `datasets` write them."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .. import schema
from ..conversations import check_conversation
from ..records import check_regions, convert, parquet_records, picture, refuse_misspelt
from ..registry import Entry, Layout, Source, register


_NEEDED = {"regions": {"image", "masks", "targets"}, "conversations": {"images", "messages"}}
_COLUMNS = {*schema.REGION_FEATURES, *schema.REGION_EXTRAS, *schema.CONVERSATION_FEATURES, *schema.CONVERSATION_EXTRAS}


def parquet_kind(shard: str) -> str:
    """Which kind of rows a parquet file has, "regions" or "conversations", by its first.

    Raises:
        ValueError: neither, or it is no parquet file, or an empty one.
    """
    place, record = next(parquet_records(shard), (shard, ValueError(f"{shard}: an empty file")))
    if isinstance(record, ValueError):
        raise record
    return _kind(record, place)


def _kind(record: Mapping[str, Any], place: str) -> str:
    for kind, columns in _NEEDED.items():
        if columns <= record.keys():
            return kind
    raise ValueError(f"{place}: expected columns {' or '.join(map(str, _NEEDED.values()))}, got {list(record)}")


def parquet_rows(shard: str, source: Source) -> Iterator[Entry]:
    """The rows of a parquet file; paths of pictures without bytes are relative to its folder (or to `images`)."""
    base = Path(source.images or Path(shard).parent)

    def row_of(record: dict[str, Any], place: str, split: str) -> dict[str, Any]:
        kind = _kind(record, place)
        refuse_misspelt(record, _COLUMNS, place)
        known = {name: value for name, value in record.items() if name in _COLUMNS and value is not None}
        known |= {"split": split, "masks": known.get("masks", [])}
        for name in {"images", "masks"} & known.keys():
            known[name] = [_picture(entry, base, f"{place}, {name} {i}") for i, entry in enumerate(known[name])]
        if kind == "regions":
            row = schema.region_row(
                **{"targets": [], **known, "image": _picture(record["image"], base, f"{place}, image")}
            )
            check_regions(row, place)
        else:
            known["targets"] = known.get("targets") or [""] * len(known["masks"])
            row = schema.conversation_row(**{"id": place, "images": [], "messages": [], **known})
            check_conversation(row, place)
        return row

    yield from convert(parquet_records(shard), source, source.split_of(shard), row_of)


def _picture(entry: Any, base: Path, place: str) -> dict[str, Any]:
    entry = {"path": entry} if isinstance(entry, str) else entry
    if isinstance(entry, dict) and entry.get("bytes") is not None:
        return {"path": entry.get("path") or place, "bytes": entry["bytes"]}
    if isinstance(entry, dict) and entry.get("path"):
        return picture(base / entry["path"])
    raise ValueError(f"{place}: expected the path or the bytes of a picture, got {entry!r}")


def _looks_like(path: Path, record: Mapping[str, Any]) -> bool:
    named = all(isinstance(target, str) for target in record.get("targets") or ())  # not by numbers of classes
    return path.suffix == ".parquet" and named and any(columns <= record.keys() for columns in _NEEDED.values())


_shards = partial(Source.files, suffixes=(".parquet",), recursive=True)
register(Layout("parquet", parquet_kind, _shards, parquet_rows, _looks_like))
