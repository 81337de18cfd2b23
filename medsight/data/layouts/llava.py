"""Conversations as LLaVA-Med and PubMedVision have them, and grounded ones, whose answers cite region codes.

A record is `{"id", "image" or "images", "conversations": [{"from": "human" | "gpt", "value"}, ...]}`; a grounded one
has `mask_files: {id: path}` and `mask_orders: [id, ...]` besides: the mask `mask_files[mask_orders[i]]` is the target
of the i-th region code in the answers.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..conversations import conversation
from ..records import JSON_SUFFIXES, as_text, convert, json_records, picture
from ..registry import Entry, Layout, Source, register


def llava_rows(shard: str, source: Source) -> Iterator[Entry]:
    """The conversations of a JSON or JSONL file, plain or grounded."""
    base = Path(source.images or Path(shard).parent)

    def row_of(record: dict[str, Any], place: str, split: str) -> dict[str, Any]:
        if record.get("id") is not None:
            place = f"{place} (id {str(record['id'])!r})"
        images = [picture(base / name) for name in _image_names(record, place)]
        masks = [picture(base / name) for name in _mask_names(record, place)]
        return conversation(record, place, images, masks, source, split)

    yield from convert(json_records(shard), source, source.split_of(shard), row_of)


def _image_names(record: dict[str, Any], place: str) -> list[str]:
    names = record.get("images") if record.get("images") is not None else record.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{place}: expected the path of an image or a list of paths, got {names!r}")
    return names


def _mask_names(record: dict[str, Any], place: str) -> list[str]:
    files, orders = record.get("mask_files") or {}, record.get("mask_orders")
    if not isinstance(files, dict) or not isinstance(orders, list | None):
        raise ValueError(
            f"{place}: expected mask_files as {{id: path}} and mask_orders as a list of ids, got {record}"
        )
    if orders is None and len(files) > 1:
        raise ValueError(f"{place}: {len(files)} mask_files without mask_orders: which code each is for is unknown")
    ids = list(map(str, files if orders is None else orders))
    by_id = {str(key): path for key, path in files.items()}
    for number in ids:
        if number not in by_id:
            raise ValueError(f"{place}: mask_orders names {number}, which mask_files lacks (it has {sorted(by_id)})")
    for number in by_id:
        if number not in ids:
            raise ValueError(f"{place}: the mask {number!r} of mask_files is in no place of mask_orders")
    return [as_text(by_id[number], place, "mask_files") for number in ids]


def _looks_like_llava(path: Path, record: Mapping[str, Any]) -> bool:
    return bool({"conversations", "conversatons"} & record.keys()) and "mask_files" not in record


def _looks_like_grounded(path: Path, record: Mapping[str, Any]) -> bool:
    return "mask_files" in record


_shards = partial(Source.files, suffixes=JSON_SUFFIXES)
# One reader; the second name is for those who want to say what the answers have.
register(Layout("llava", "conversations", _shards, llava_rows, _looks_like_llava))
register(Layout("grounded", "conversations", _shards, llava_rows, _looks_like_grounded))
