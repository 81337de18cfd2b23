"""Rows in parquet files of this package's own schema, as `medsight data annotate` and `datasets` write them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..conversations import check_conversation
from ..records import check_regions, convert, parquet_records
from ..registry import Entry, Layout, Source, register
from ..schema import CONVERSATION_EXTRAS, CONVERSATION_FEATURES, REGION_EXTRAS, REGION_FEATURES
from ..splits import canonical_split


_NEEDED = {"regions": ("image", "masks", "targets"), "conversations": ("images", "messages")}


def parquet_kind(shard: str) -> str:
    """Which kind of rows a parquet file has, "regions" or "conversations".

    Raises:
        ValueError: neither, or it is no parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(shard).names
    except pyarrow.ArrowException as error:
        raise ValueError(f"{shard}: not a parquet file, or a damaged one ({error})") from error
    for kind, columns in _NEEDED.items():
        if set(columns) <= set(names):
            return kind
    raise ValueError(f"{shard}: expected columns {' and '.join(map(str, _NEEDED.values()))}, got {names}")


def parquet_rows(shard: str, source: Source) -> Iterator[Entry]:
    """The rows of a parquet file; paths of pictures without bytes are relative to its folder (or to `images`)."""
    try:
        kind = parquet_kind(shard)
    except ValueError as error:
        yield Entry(shard, error=error)
        return
    base = Path(source.images) if source.images else Path(shard).parent
    split = source.split_of(shard)

    def row_of(record: dict[str, Any], place: str) -> dict[str, Any]:
        regions = kind == "regions"
        columns = (*REGION_FEATURES, *REGION_EXTRAS) if regions else (*CONVERSATION_FEATURES, *CONVERSATION_EXTRAS)
        row: dict[str, Any] = {name: record.get(name) for name in columns}
        row["split"] = canonical_split(row["split"] or split or source.split or "train")
        for name in ("masks",) if regions else ("images", "masks"):
            row[name] = [_picture(entry, base, f"{place}, {name} {i}") for i, entry in enumerate(row[name] or [])]
        if regions:
            row["image"] = _picture(row["image"], base, f"{place}, image")
            row["absent"], row["targets"] = row["absent"] or [], row["targets"] or []
            row["spacing_mm"] = row["spacing_mm"] or [None] * len(row["masks"])
            check_regions(row, place)
        else:
            row["targets"], row["options"] = row["targets"] or [""] * len(row["masks"]), row["options"] or []
            check_conversation(row, place)
        return row

    yield from convert(
        parquet_records(shard), row_of, lambda record: source.takes(record, record.get("split") or split)
    )


def _picture(entry: Any, base: Path, place: str) -> dict[str, Any]:
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict) or not (entry.get("path") or entry.get("bytes") is not None):
        raise ValueError(f"{place}: expected the path or the bytes of a picture, got {entry!r}")
    if entry.get("bytes") is not None:
        return {"path": entry.get("path") or place, "bytes": entry["bytes"]}
    return {"path": str(base / entry["path"]), "bytes": None}


def _looks_like(path: Path, record: Mapping[str, Any] | None) -> bool:
    return path.suffix == ".parquet" and record is not None and not {"image", "question", "answer"} <= set(record)


register(
    Layout(
        "parquet", parquet_kind, lambda source: source.files((".parquet",), recursive=True), parquet_rows, _looks_like
    )
)
