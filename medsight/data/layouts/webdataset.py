"""Tar shards of samples, rows packed with their pictures (WebDataset).

A sample of a tar shard is the run of members that share their name up to its first dot: `KEY.json`; its images,
`KEY.png` (or jpg, ...) for one, `KEY.0.png`, `KEY.1.png`, ... for several; its masks, `KEY.mask.0.png`,
`KEY.mask.1.png`, .... The JSON is a record of the LLaVA type for a conversation, or `{"targets": [...], "modality",
"site", ...}`, named as in `schema.REGION_FEATURES`, for an image with masks. The builder "webdataset" of `datasets`
asks that all samples have the same members, which they have not where they have different numbers of masks, so the
shards are read here.
"""

import re
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from ..conversations import conversation
from ..records import IMAGE_SUFFIXES, Record, as_text, check_regions, convert, json_object, patient_of, refuse_misspelt
from ..registry import Entry, Layout, Source, register
from ..schema import REGION_EXTRAS, REGION_FEATURES, region_row


_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_SUFFIX = "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
_PICTURE = re.compile(rf"(?P<mask>mask\.)?(?:(?P<number>\d+)\.)?(?:{_SUFFIX})", re.IGNORECASE)
_PICTURES = "pictures of the sample"  # no field of its JSON


def webdataset_kind(shard: str) -> str:
    """Which kind of samples a shard has, "regions" or "conversations", by its first; a bad one raises ValueError."""
    for _, sample in _samples(shard):
        if isinstance(sample, ValueError):
            raise sample
        return "conversations" if "conversations" in sample else "regions"
    raise ValueError(f"{shard}: an empty tar file")


def webdataset_rows(shard: str, source: Source) -> Iterator[Entry]:
    """The samples of a tar shard, read in one pass."""

    def row_of(sample: dict[str, Any], place: str, split: str) -> dict[str, Any]:
        images, masks = _images_and_masks(sample.pop(_PICTURES), place)
        if "conversations" in sample:
            return conversation({"id": place, **sample}, place, images, masks, source, split)
        refuse_misspelt(sample, REGION_FEATURES.keys() | REGION_EXTRAS, place)
        if len(images) != 1:
            raise ValueError(f"{place}: expected one image, got {len(images)}")
        row = region_row(
            images[0],
            masks,
            sample.get("targets") or [],
            split,
            **{name: as_text(sample.get(name), place, name) for name in ("modality", "site")},
            **{name: sample[name] for name in ("finding", "label_origin", "absent", "spacing_mm") if sample.get(name)},
            dataset=sample.get("dataset") or source.name,
            patient=patient_of(sample.get("patient")) or place,
        )
        check_regions(row, place)
        return row

    yield from convert(_samples(shard), source, source.split_of(shard), row_of)


def _samples(shard: str) -> Iterator[Record]:
    """The JSON of each sample, with its pictures by what follows the sample's name."""
    key = "none"
    try:
        for key, members in groupby(_members(shard), key=lambda member: member[0]):
            place, sample = f"{shard}, sample {key}", {suffix: entry for _, suffix, entry in members}
            if "json" not in sample:
                yield place, ValueError(f"{place}: expected a member .json, got {sorted(sample)}")
                continue
            meta = sample.pop("json")
            _, record = json_object(meta["path"], meta["bytes"])
            yield place, record if isinstance(record, ValueError) else {**record, _PICTURES: sample}
    except (tarfile.TarError, EOFError, OSError) as error:
        yield shard, ValueError(f"{shard}: not a tar file, or a damaged one, after sample {key} ({error})")


def _members(shard: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The name of the sample, what follows it, and the content of each file."""
    with tarfile.open(shard, "r|*") as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)):
                folder, _, name = member.name.rpartition("/")
                start, _, suffix = name.partition(".")
                key = f"{folder}/{start}".lstrip("/")
                yield key, suffix, {"path": f"{shard}, {member.name}", "bytes": file.read()}


def _images_and_masks(pictures: dict[str, Any], place: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those of each in the order of their numbers, which must count from 0; one image may have none."""
    found: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
    for suffix, entry in pictures.items():
        match = _PICTURE.fullmatch(suffix)
        if match is None:
            raise ValueError(f"{place}: no use is known for the member .{suffix}")
        found[bool(match["mask"])][int(match["number"] or 0)] = entry
    if sum(map(len, found)) < len(pictures) or any(sorted(numbers) != [*range(len(numbers))] for numbers in found):
        raise ValueError(f"{place}: expected pictures numbered from 0 without a gap, got {sorted(pictures)}")
    images, masks = ([numbers[number] for number in sorted(numbers)] for numbers in found)
    return images, masks


def _looks_like(path: Path, record: Mapping[str, Any]) -> bool:
    return path.name.endswith(_TAR_SUFFIXES)


_shards = partial(Source.files, suffixes=_TAR_SUFFIXES, recursive=True)
register(Layout("webdataset", webdataset_kind, _shards, webdataset_rows, _looks_like))
