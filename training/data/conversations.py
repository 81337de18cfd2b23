"""Conversations about images, of the type of LLaVA-Med and PubMedVision, and grounded ones, whose answers cite codes.

An item is `{"id", "image" or "images", "conversations": [{"from": "human" | "gpt", "value"}, ...]}`; a grounded one
has `mask_files: {id: path}` and `mask_orders: [id, ...]` besides: the mask `mask_files[mask_orders[i]]` is the target
of the i-th region code in the answers. Codes are spelled `[C0_16]`, or `[M0_16]` as the released checkpoint does.
"""

import hashlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import JSON_SUFFIXES, Item, as_text, convert, json_records, patient_of, required, source_files, split_of
from .schema import IMAGE_MARKER
from .splits import Member, canonical_split, hold_out


if TYPE_CHECKING:
    from datasets import Dataset

    from .sources import Source

logger = logging.getLogger(__name__)
_NUMBER = "(?:0|[1-9][0-9]*)"
_CODE = re.compile(rf"\[C{_NUMBER}_{_NUMBER}\]|\[SEG\]")
_RELEASED_CODE = re.compile(rf"\[M({_NUMBER}_{_NUMBER})\]")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class CodeMaskError(ValueError):
    """The region codes of a conversation's answers and its masks do not match."""


def llava_shards(source: "Source") -> list[str]:
    """The JSON files of a source; raises as `records.source_files`."""
    return source_files(source, JSON_SUFFIXES)


def llava_items(shard: str, source: "Source") -> Iterator[Item]:
    """The conversations of a JSON or JSONL file, plain or grounded."""
    base = Path(source.images) if source.images else Path(shard).parent
    split = split_of(shard, source)

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


def conversation(
    record: dict[str, Any],
    place: str,
    images: list[dict[str, Any]],
    masks: list[dict[str, Any]],
    source: "Source",
    split: str | None = None,
) -> dict[str, Any]:
    """A row of `schema.CONVERSATION_FEATURES` from an item of the LLaVA type and its pictures.

    Args:
        record: the item; of its origin it may tell dataset, modality, site (or body_part), split, patient and targets.
        place: file and item, for errors.
        images: in the order of their markers; where the text has no marker they go before the first user's turn.
        masks: in the order of the codes in the answers.
        source, split: say what the item does not.

    Raises:
        ValueError: turns are missing or of unknown roles, or markers and images, or codes and masks, do not match.
    """
    # LLaVA-Med's published files misspell the key in part.
    turns = required(record, place, "conversations", "conversatons")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{place}: expected conversations as a list of turns, got {turns!r}")
    messages = []
    for turn in turns:
        role = _ROLES.get(required(turn, place, "from", "role"))
        if role is None:
            raise ValueError(f"{place}: a turn is from {turn.get('from')!r}: expected 'human', 'gpt' or 'system'")
        content = as_text(turn.get("value", turn.get("content")), place, "value")
        messages.append({"role": role, "content": _RELEASED_CODE.sub(r"[C\1]", content)})
    if images and not any(IMAGE_MARKER in message["content"] for message in messages):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is not None:
            first["content"] = f"{IMAGE_MARKER}\n" * len(images) + first["content"]
    domain = record.get("domain")
    pictured = " ".join(sorted(key for key, value in domain.items() if value)) if isinstance(domain, dict) else None
    row = {
        "id": str(record.get("id", place)),
        "images": images,
        "messages": messages,
        "masks": masks,
        "targets": record.get("targets") or [""] * len(masks),
        "dataset": str(record.get("dataset") or source.name),
        "modality": record.get("modality") or pictured or None,
        "site": record.get("site") or record.get("body_part"),
        "split": canonical_split(record.get("split") or split or source.split or "train"),
        "patient": patient_of(record.get("patient")) or (images[0]["path"] if images else None),
    }
    check_conversation(row, place)
    return row


def count_codes(text: str) -> int:
    """How many region codes a text cites."""
    return len(_CODE.findall(text))


def cited_codes(messages: list[dict[str, str]]) -> list[str]:
    """The region codes that the assistant's turns cite, in order; one may come more than once."""
    return [
        code for message in messages if message["role"] == "assistant" for code in _CODE.findall(message["content"])
    ]


def code_images(messages: list[dict[str, str]]) -> list[int]:
    """For each cited code the index of the image it belongs to: the last one before it, or -1 where there is none."""
    owners, image = [], -1
    for message in messages:
        if message["role"] == "assistant":
            owners += [image] * count_codes(message["content"])
        image += message["content"].count(IMAGE_MARKER)
    return owners


def check_conversation(row: dict[str, Any], place: str) -> None:
    """Raises ValueError naming `place` if a row's turns, markers, codes, masks and targets do not belong together."""
    messages = row["messages"]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"{place}: expected turns of user and assistant by turns, user first, got {roles}")
    markers = dict.fromkeys(roles, 0)
    for message in messages:
        markers[message["role"]] += message["content"].count(IMAGE_MARKER)
    if sum(markers.values()) != markers["user"]:
        raise ValueError(f"{place}: {IMAGE_MARKER} stands outside the user's turns")
    if markers["user"] != len(row["images"]):
        raise ValueError(
            f"{place}: {markers['user']} {IMAGE_MARKER} marker(s) in the text, {len(row['images'])} image(s)"
        )
    owners = code_images(messages)
    if len(owners) != len(row["masks"]):
        raise CodeMaskError(
            f"{place}: the answers cite {len(owners)} region code(s) {cited_codes(messages)}, but there are "
            f"{len(row['masks'])} mask(s)"
        )
    if -1 in owners:
        raise CodeMaskError(f"{place}: the code {cited_codes(messages)[owners.index(-1)]} stands before any image")
    if len(row["targets"]) != len(row["masks"]):
        raise ValueError(f"{place}: {len(row['targets'])} target(s) for {len(row['masks'])} mask(s)")


def held_out(
    rows: "Dataset", fraction: float, seed: int, beside: Sequence[tuple["Dataset", "Dataset"]] = ()
) -> set[int]:
    """Positions of the conversations to hold out for validation, by patient, as `splits.hold_out` says.

    All conversations of an image come on one side, whatever data set they are of, also where one of several images is
    shared; so do all of a patient, but of data sets of fewer than five. The same patients as from the images of the
    same data, for the same fraction and seed. Images are told apart by their paths, and none is read; where any is
    embedded, by their content.

    Args:
        rows: of `schema.CONVERSATION_FEATURES`, map-style.
        fraction: of every data set's patients; 0 draws none.
        seed: of the choice.
        beside: training and validation rows of other data, of either kind: conversations about an image, or a patient
            of a data set, that is on one side there come on the same.

    Raises:
        ValueError: see `splits.hold_out`; `beside` others, nothing need be left to hold out.
    """
    naming = ImageNames(any(map(has_embedded, (rows, *chain(*beside)))))
    names = list(naming.of_rows(rows))
    images, patients = _Union(), _Union()
    owners: dict[str, str] = {}  # image -> one of its patients
    for some in names:
        for name in some:
            images.join(some[0], name)
    members = []
    origin = rows.select_columns(["dataset", "patient", "modality"])
    for position, (row, some) in enumerate(zip(origin, names, strict=True)):
        image = images.first(some[0]) if some else f"row {position:09d}"
        patient = _patient(row) or image
        patients.join(owners.setdefault(image, patient), patient)
        members.append(Member(row["dataset"] or "", patient, row["modality"] or "", image))
    members = [member._replace(patient=patients.first(member.patient)) for member in members]
    of_images, of_patients = _sides(beside, naming, images, patients)
    sides: dict[str, bool] = {}  # of images; what anything holds out is held out
    for member in members:
        for side in (of_images.get(member.image), of_patients.get(member.patient)):
            if side is not None:
                sides[member.image] = sides.get(member.image, False) or side
    free = [position for position, member in enumerate(members) if member.image not in sides]
    drawn = {free[place] for place in hold_out([members[i] for i in free], fraction, seed, required=not beside)}
    left = {members[i][:2] for i in free if i not in drawn}  # a volume may be left in part
    whole = {members[i].patient for i in drawn if members[i][:2] not in left}
    drawn |= {i for i in free if members[i].patient in whole}
    held = drawn | {position for position, member in enumerate(members) if sides.get(member.image)}
    if fraction and not held:
        logger.warning("all conversations are about images or patients whose masks are trained on: none is held out")
    return held


def _patient(row: dict[str, Any]) -> str | None:
    """A name of a row's patient that no other data set has."""
    return f"{row['dataset'] or ''}\0{row['patient']}" if row["patient"] else None


def _sides(
    beside: Sequence[tuple["Dataset", "Dataset"]], naming: "ImageNames", images: "_Union", patients: "_Union"
) -> tuple[dict[str, bool], dict[str, bool]]:
    """Whether an image, and a patient who is on one side alone, is held out in other data."""
    of_images: dict[str, bool] = {}
    of_patients: dict[str, set[bool]] = defaultdict(set)
    for held, rows in chain(*map(enumerate, beside)):
        for row, names in zip(rows.select_columns(["dataset", "patient"]), naming.of_rows(rows), strict=True):
            for image in map(images.first, names):
                of_images[image] = of_images.get(image, False) or bool(held)
            if patient := _patient(row):
                of_patients[patients.first(patient)].add(bool(held))
    return of_images, {patient: found.pop() for patient, found in of_patients.items() if len(found) == 1}


class _Union:
    """Names joined into sets; a set is called by the first of its names, whatever the order of joining."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def first(self, name: str) -> str:
        while (parent := self._parents.get(name, name)) != name:
            self._parents[name] = self._parents.get(parent, parent)
            name = parent
        return name

    def join(self, one: str, other: str) -> None:
        low, high = sorted((self.first(one), self.first(other)))
        self._parents[high] = low


class ImageNames:
    """What tells images apart: their absolute paths, or their content, named by the first path that it was met at.

    Args:
        by_content: read all images; one that cannot be read goes by its path.
    """

    def __init__(self, by_content: bool) -> None:
        self.by_content = by_content
        self._named: dict[bytes, str] = {}

    def of_rows(self, rows: "Dataset") -> Iterator[list[str]]:
        """The names of each row's images, of either kind of rows."""
        column = "image" if "image" in rows.column_names else "images"
        for batch in rows.select_columns([column]).with_format("arrow").iter(batch_size=100):
            for some in batch[column].to_pylist():
                yield [self._name(entry) for entry in (some or [] if column == "images" else [some])]

    def _name(self, entry: dict[str, Any]) -> str:
        content = entry.get("bytes")
        path = entry["path"] if content is not None else os.path.abspath(entry["path"])
        if not self.by_content:
            return path
        try:
            content = Path(path).read_bytes() if content is None else content
        except OSError:
            return path
        return self._named.setdefault(hashlib.sha256(content).digest(), f"{path}\0{len(self._named)}")


def has_embedded(rows: "Dataset") -> bool:
    """Whether any image of the rows is embedded; none is read."""
    import pyarrow.compute as pc

    column = "image" if "image" in rows.column_names else "images"
    for batch in rows.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        pictures = batch[column].combine_chunks()
        pictures = pc.list_flatten(pictures) if column == "images" else pictures
        if pc.any(pc.is_valid(pc.struct_field(pictures, "bytes"))).as_py():
            return True
    return False
