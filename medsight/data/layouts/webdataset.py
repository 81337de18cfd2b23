"""Rows packed with their pictures: parquet files in this package's own schema, and tar shards of samples (WebDataset).

A sample of a tar shard is the run of members that share their name up to its first dot: `KEY.json`; its images,
`KEY.png` (or jpg, ...) for one, `KEY.0.png`, `KEY.1.png`, ... for several; its masks, `KEY.mask.0.png`,
`KEY.mask.1.png`, .... The JSON is an item of the LLaVA type for a conversation, or `{"targets": [...], "modality",
"site", ...}`, named as in `schema.REGION_FEATURES`, for an image with masks. The builder "webdataset" of `datasets`
asks that all samples have the same members, which they have not where they have different numbers of masks, so the
shards are read here.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .conversations import check_conversation, conversation
from .records import (
    IMAGE_SUFFIXES,
    Item,
    Record,
    as_text,
    check_regions,
    convert,
    parquet_records,
    patient_of,
    source_files,
    split_of,
)
from .schema import CONVERSATION_FEATURES, REGION_FEATURES
from .splits import canonical_split


if TYPE_CHECKING:
    from .sources import Source

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_SUFFIX = "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
_IMAGE = re.compile(rf"(?:(\d+)\.)?(?:{_SUFFIX})", re.IGNORECASE)
_MASK = re.compile(rf"mask\.(\d+)\.(?:{_SUFFIX})", re.IGNORECASE)
_PICTURES = {"regions": ("masks",), "conversations": ("images", "masks")}
_OWN = {"regions": ("image", "masks", "targets"), "conversations": ("images", "messages")}


def parquet_shards(source: "Source") -> list[str]:
    """The parquet files of a source; raises as `records.source_files`."""
    return source_files(source, (".parquet",), recursive=True)


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
    for kind, columns in _OWN.items():
        if set(columns) <= set(names):
            return kind
    raise ValueError(f"{shard}: expected columns {' and '.join(map(str, _OWN.values()))}, got {names}")


def parquet_items(shard: str, source: "Source") -> Iterator[Item]:
    """The rows of a parquet file; paths of pictures without bytes are relative to its folder (or to `images`)."""
    try:
        kind = parquet_kind(shard)
    except ValueError as error:
        yield Item(shard, error=error)
        return
    features = REGION_FEATURES if kind == "regions" else CONVERSATION_FEATURES
    base = Path(source.images) if source.images else Path(shard).parent
    split = split_of(shard, source)

    def row_of(record: dict[str, Any], place: str) -> dict[str, Any]:
        row = {name: record.get(name) for name in features}
        row["split"] = canonical_split(row["split"] or split or source.split or "train")
        for name in _PICTURES[kind]:
            row[name] = [_picture(entry, base, f"{place}, {name} {i}") for i, entry in enumerate(row[name] or [])]
        if kind == "regions":
            row["image"] = _picture(row["image"], base, f"{place}, image")
            row["absent"], row["targets"] = row["absent"] or [], row["targets"] or []
            check_regions(row, place)
        else:
            row["targets"] = row["targets"] or [""] * len(row["masks"])
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


def webdataset_shards(source: "Source") -> list[str]:
    """The tar files of a source; raises as `records.source_files`."""
    return source_files(source, TAR_SUFFIXES, recursive=True)


def webdataset_kind(shard: str) -> str:
    """Which kind of samples a shard has, "regions" or "conversations", by its first; a bad one raises ValueError."""
    for _, sample in _samples(shard):
        if isinstance(sample, ValueError):
            raise sample
        return "conversations" if "conversations" in sample["json"] else "regions"
    raise ValueError(f"{shard}: an empty tar file")


def webdataset_items(shard: str, source: "Source") -> Iterator[Item]:
    """The samples of a tar shard, read in one pass."""
    split = split_of(shard, source)

    def row_of(sample: dict[str, Any], place: str) -> dict[str, Any]:
        meta = sample["json"]
        images, masks = _numbered(sample, _IMAGE, place), _numbered(sample, _MASK, place)
        unknown = [
            name for name in sample if name != "json" and not _IMAGE.fullmatch(name) and not _MASK.fullmatch(name)
        ]
        if unknown:
            raise ValueError(f"{place}: no use is known for the member .{unknown[0]}")
        if "conversations" in meta:
            return conversation({"id": place, **meta}, place, images, masks, source, split)
        if len(images) != 1:
            raise ValueError(f"{place}: expected one image, got {len(images)}")
        row = {
            **{name: meta.get(name) for name in REGION_FEATURES},
            "image": images[0],
            "masks": masks,
            "targets": meta.get("targets") or [],
            "absent": meta.get("absent") or [],
            "dataset": meta.get("dataset") or source.name,
            "split": canonical_split(meta.get("split") or split or source.split or "train"),
            "patient": patient_of(meta.get("patient")) or place,
        }
        for name in ("modality", "site"):
            as_text(row[name], place, name)
        check_regions(row, place)
        return row

    def takes(sample: dict[str, Any]) -> bool:
        return source.takes(sample["json"], sample["json"].get("split") or split)

    yield from convert(_samples(shard), row_of, takes)


def _samples(shard: str) -> Iterator[Record]:
    """The members of each sample by what follows their common name, the JSON parsed."""
    for place, sample in _members(shard):
        try:
            yield place, sample if isinstance(sample, ValueError) else {**sample, "json": _meta(sample, place)}
        except ValueError as error:
            yield place, error


def _members(shard: str) -> Iterator[Record]:
    key: str | None = None
    sample: dict[str, Any] = {}
    try:
        with tarfile.open(shard, "r|*") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                start, _, rest = name.partition(".")
                if key is not None and f"{folder}/{start}" != key:
                    yield f"{shard}, sample {key.lstrip('/')}", sample
                    sample = {}
                key = f"{folder}/{start}"
                file = archive.extractfile(member)
                sample[rest] = {"path": f"{shard}, {member.name}", "bytes": file.read() if file else b""}
    except (tarfile.TarError, EOFError, OSError) as error:
        yield shard, ValueError(f"{shard}: not a tar file, or a damaged one, after sample {key} ({error})")
        return
    if key is not None:
        yield f"{shard}, sample {key.lstrip('/')}", sample


def _meta(sample: dict[str, Any], place: str) -> dict[str, Any]:
    if "json" not in sample:
        raise ValueError(f"{place}: expected a member .json, got {sorted(sample)}")
    try:
        meta = json.loads(sample["json"]["bytes"])
    except ValueError as error:
        raise ValueError(f"{sample['json']['path']}: not JSON ({error})") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{sample['json']['path']}: expected a JSON object, got {type(meta).__name__}")
    return meta


def _numbered(sample: dict[str, Any], pattern: re.Pattern[str], place: str) -> list[dict[str, Any]]:
    """The pictures that match, in the order of their numbers, which must count from 0."""
    found = [(match[1], sample[name]) for name in sample if (match := pattern.fullmatch(name))]
    if len(found) == 1 and found[0][0] is None:
        return [found[0][1]]
    numbers = sorted(int(number) if number is not None else -1 for number, _ in found)
    if numbers != list(range(len(found))):
        raise ValueError(f"{place}: expected pictures numbered from 0 without a gap, got {sorted(sample)}")
    return [picture for _, picture in sorted(found, key=lambda pair: int(pair[0] or 0))]
