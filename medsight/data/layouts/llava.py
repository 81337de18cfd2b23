"""Conversations as LLaVA-Med and PubMedVision have them, and grounded ones, whose answers cite region codes.

A record is `{"id", "image" or "images", "conversations": [{"from": "human" | "gpt", "value"}, ...]}`; a grounded one
has `mask_files: {id: path}` and `mask_orders: [id, ...]` besides: the mask `mask_files[mask_orders[i]]` is the target
of the i-th region code in the answers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..conversations import conversation
from ..records import JSON_SUFFIXES, as_text, convert, json_records
from ..registry import Entry, Layout, Source, register


def llava_rows(shard: str, source: Source) -> Iterator[Entry]:
    """The conversations of a JSON or JSONL file, plain or grounded."""
    base = Path(source.images) if source.images else Path(shard).parent
    split = source.split_of(shard)

    def row_of(record: dict[str, Any], place: str) -> dict[str, Any]:
        if record.get("id") is not None:
            place = f"{place} (id {str(record['id'])!r})"
        images = [{"path": str(base / name), "bytes": None} for name in _image_names(record, place)]
        masks = [{"path": str(base / name), "bytes": None} for name in _mask_names(record, place)]
        return conversation(record, place, images, masks, source, split)

    yield from convert(json_records(shard), row_of, lambda record: source.takes(record, record.get("split") or split))


def _image_names(record: dict[str, Any], place: str) -> list[str]:
    names = record.get("images") if record.get("images") is not None else record.get("image")
    if names is None:
        return []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{place}: expected the path of an image or a list of paths, got {names!r}")
    return names


def _mask_names(record: dict[str, Any], place: str) -> list[str]:
    files, orders = record.get("mask_files") or {}, record.get("mask_orders")
    if not isinstance(files, dict):
        raise ValueError(f"{place}: expected mask_files as {{id: path}}, got {files!r}")
    if orders is None:
        if len(files) > 1:
            raise ValueError(
                f"{place}: {len(files)} mask_files without mask_orders: which code each is for is unknown"
            )
        orders = list(files)
    if not isinstance(orders, list) or not all(isinstance(order, (str, int)) for order in orders):
        raise ValueError(f"{place}: expected mask_orders as a list of ids of mask_files, got {orders!r}")
    by_id = {str(key): path for key, path in files.items()}
    unknown = [order for order in orders if str(order) not in by_id]
    if unknown:
        raise ValueError(f"{place}: mask_orders names {unknown[0]!r}, which mask_files lacks (it has {sorted(by_id)})")
    unused = sorted(set(by_id) - {str(order) for order in orders})
    if unused:
        raise ValueError(f"{place}: the mask {unused[0]!r} of mask_files is in no place of mask_orders")
    return [as_text(by_id[str(order)], place, "mask_files") for order in orders]


def _looks_like(name: str) -> Any:
    def looks_like(path: Path, record: Any) -> bool:
        if record is None or not {"mask_files", "conversations", "conversatons"} & set(record):
            return False
        return name == ("grounded" if "mask_files" in record else "llava")

    return looks_like


for _name in ("llava", "grounded"):  # one reader; the second name is for those who want to say what the answers have
    register(
        Layout(_name, "conversations", lambda source: source.files(JSON_SUFFIXES), llava_rows, _looks_like(_name))
    )
