"""Conversations about images: rows of them, and the region codes and masks that belong together."""

import re
from typing import Any

from processing_medsight.region_codes_medsight import find_codes

from .records import as_text, patient_of, required
from .registry import Source
from .schema import IMAGE_MARKER, conversation_row


_NUMBER = "(?:0|[1-9][0-9]*)"
_RELEASED_CODE = re.compile(rf"\[M({_NUMBER}_{_NUMBER})\]")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class CodeMaskError(ValueError):
    """The region codes of a conversation's answers and its masks do not match."""


def conversation(
    record: dict[str, Any],
    place: str,
    images: list[dict[str, Any]],
    masks: list[dict[str, Any]],
    source: Source,
    split: str,
) -> dict[str, Any]:
    """A row of conversations from a record of the LLaVA type and its pictures.

    Args:
        record: with "conversations": [{"from": "human" | "gpt", "value"}, ...], in which codes are spelled [C0_16], or
            [M0_16] as the released checkpoint does; it may tell targets, dataset, modality, site (or body_part),
            split and patient.
        place: file and record, for errors.
        images: in the order of their markers; where the text has no marker they go before the first user's turn.
        masks: in the order of the codes in the answers.
        source: names the data set where the record does not.
        split: of the row.

    Raises:
        ValueError: turns are missing or of unknown roles, or markers and images, or codes and masks, do not match.
    """
    # LLaVA-Med's published files misspell the key in part.
    turns = required(record, place, "conversations", "conversatons")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{place}: expected conversations as a list of turns, got {turns!r}")
    messages = []
    for turn in turns:
        role = required(turn, place, "from", "role")
        if role not in _ROLES:
            raise ValueError(f"{place}: a turn is from {role!r}: expected 'human', 'gpt' or 'system'")
        content = as_text(turn.get("value", turn.get("content")), place, "value")
        messages.append({"role": _ROLES[role], "content": _RELEASED_CODE.sub(r"[C\1]", content)})
    asked = [message for message in messages if message["role"] == "user"]
    if asked and not any(IMAGE_MARKER in message["content"] for message in messages):
        asked[0]["content"] = f"{IMAGE_MARKER}\n" * len(images) + asked[0]["content"]
    domain = record.get("domain")
    pictured = " ".join(sorted(key for key, value in domain.items() if value)) if isinstance(domain, dict) else None
    row = conversation_row(
        str(record.get("id", place)),
        images,
        messages,
        split,
        masks=masks,
        targets=record.get("targets") or [""] * len(masks),
        dataset=str(record.get("dataset") or source.name),
        modality=record.get("modality") or pictured or None,
        site=record.get("site") or record.get("body_part"),
        patient=patient_of(record.get("patient")) or (images[0]["path"] if images else None),
    )
    check_conversation(row, place)
    return row


def cited_codes(messages: list[dict[str, str]]) -> list[str]:
    """The region codes that the assistant's turns cite, in order; one may come more than once."""
    return [code for message in messages if message["role"] == "assistant" for code in find_codes(message["content"])]


def code_images(messages: list[dict[str, str]]) -> list[int]:
    """For each cited code the index of the image it belongs to: the last one before it, or -1 where there is none."""
    owners, image = [], -1
    for message in messages:
        if message["role"] == "assistant":
            owners += [image] * len(find_codes(message["content"]))
        image += message["content"].count(IMAGE_MARKER)
    return owners


def check_conversation(row: dict[str, Any], place: str) -> None:
    """Raises ValueError naming `place` if a row's turns, markers, codes, masks and targets do not belong together."""
    messages, masks = row["messages"], row["masks"]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"{place}: expected turns of user and assistant by turns, user first, got {roles}")
    markers = sum(message["content"].count(IMAGE_MARKER) for message in messages)
    if markers != sum(message["content"].count(IMAGE_MARKER) for message in messages if message["role"] == "user"):
        raise ValueError(f"{place}: {IMAGE_MARKER} stands outside the user's turns")
    if markers != len(row["images"]):
        raise ValueError(f"{place}: {markers} {IMAGE_MARKER} marker(s) in the text, {len(row['images'])} image(s)")
    codes, owners = cited_codes(messages), code_images(messages)
    if len(codes) != len(masks):
        raise CodeMaskError(
            f"{place}: the answers cite {len(codes)} region code(s) {codes}, but there are {len(masks)} mask(s)"
        )
    if -1 in owners:
        raise CodeMaskError(f"{place}: the code {codes[owners.index(-1)]} stands before any image")
    if len(row["targets"]) != len(masks):
        raise ValueError(f"{place}: {len(row['targets'])} target(s) for {len(masks)} mask(s)")
