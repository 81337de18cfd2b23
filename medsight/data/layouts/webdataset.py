"""Tar shards of samples, rows packed with their pictures (WebDataset).

A sample of a tar shard is the run of members that share their name up to its first dot: `KEY.json`; its images,
`KEY.png` (or jpg, ...) for one, `KEY.0.png`, `KEY.1.png`, ... for several; its masks, `KEY.mask.0.png`,
`KEY.mask.1.png`, .... The JSON is a record of the LLaVA type for a conversation, or `{"targets": [...], "modality",
"site", ...}`, named as in `schema.REGION_FEATURES`, for an image with masks. The builder "webdataset" of `datasets`
asks that all samples have the same members, which they have not where they have different numbers of masks, so the
shards are read here.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..conversations import conversation
from ..records import IMAGE_SUFFIXES, Record, as_text, check_regions, convert, patient_of
from ..registry import Entry, Layout, Source, register
from ..schema import region_row
from ..splits import canonical_split


_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_SUFFIX = "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
_IMAGE = re.compile(rf"(?:(\d+)\.)?(?:{_SUFFIX})", re.IGNORECASE)
_MASK = re.compile(rf"mask\.(\d+)\.(?:{_SUFFIX})", re.IGNORECASE)


def webdataset_kind(shard: str) -> str:
    """Which kind of samples a shard has, "regions" or "conversations", by its first; a bad one raises ValueError."""
    for _, sample in _samples(shard):
        if isinstance(sample, ValueError):
            raise sample
        return "conversations" if "conversations" in sample["json"] else "regions"
    raise ValueError(f"{shard}: an empty tar file")


def webdataset_rows(shard: str, source: Source) -> Iterator[Entry]:
    """The samples of a tar shard, read in one pass."""
    split = source.split_of(shard)

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
        row = region_row(
            images[0],
            masks,
            meta.get("targets") or [],
            canonical_split(meta.get("split") or split or source.split or "train"),
            **{name: meta.get(name) for name in ("modality", "site", "finding", "label_origin")},
            **{name: meta[name] for name in ("absent", "spacing_mm") if meta.get(name)},
            dataset=meta.get("dataset") or source.name,
            patient=patient_of(meta.get("patient")) or place,
        )
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


def _looks_like(path: Path, record: Mapping[str, Any] | None) -> bool:
    return path.name.endswith(_TAR_SUFFIXES)


register(
    Layout(
        "webdataset",
        webdataset_kind,
        lambda source: source.files(_TAR_SUFFIXES, recursive=True),
        webdataset_rows,
        _looks_like,
    )
)
