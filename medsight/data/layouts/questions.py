"""Questions about medical images, in the layouts in which VQA-RAD, SLAKE, PathVQA and OmniMedVQA are distributed.

Each question is a conversation of one turn, "<image>" and the question; where there are options, one a line.
"""

import dataclasses
import hashlib
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..records import Record, as_text, convert, json_records, parquet_records, picture, required
from ..registry import Entry, Layout, Source, register
from ..schema import IMAGE_MARKER, conversation_row


_VQA_RAD_FILES = ("questions.jsonl", "VQA_RAD Dataset Public.json")
# What the sets call what a row says of a question; a few entries of OmniMedVQA's files spell it "modality".
_NUMBER = ("id", "qid", "question_id")
_ANSWER = ("answer", "gt_answer")
_ORIGIN = {"modality": ("modality_type", "modality"), "site": ("site", "image_organ", "location")}


def question_row(
    record: dict[str, Any], place: str, split: str, image: dict[str, Any], dataset: str, patient: str | None = None
) -> dict[str, Any]:
    """A row of conversations from the record of a question; its patient is the image, where none is named.

    Raises:
        ValueError: question, answer or number is missing or empty, or the answer is none of the options.
    """
    asked = as_text(required(record, place, "question"), place, "question")
    letters = [letter for letter in string.ascii_uppercase if record.get(f"option_{letter}") is not None]
    options = [as_text(record[f"option_{letter}"], place, f"option_{letter}") for letter in letters]
    said = as_text(required(record, place, *_ANSWER), place, "answer")
    if options and said.strip().casefold() not in {option.strip().casefold() for option in options}:
        raise ValueError(f"{place}: the answer {said!r} is none of the options {options}")
    stated = str(record.get("answer_type") or "").strip().upper()
    lines = [IMAGE_MARKER, asked, *map("{}. {}".format, letters, options)]
    return conversation_row(
        str(required(record, place, *_NUMBER)),
        [image],
        [{"role": "user", "content": "\n".join(lines)}, {"role": "assistant", "content": said}],
        split,
        answer_type="CLOSED" if options else stated if stated in ("CLOSED", "OPEN") else None,
        options=options,
        dataset=dataset,
        patient=patient or image["path"],
        **{name: next(filter(None, map(record.get, fields)), None) for name, fields in _ORIGIN.items()},
    )


def vqa_rad_shards(source: Source) -> list[str]:
    """`questions.jsonl`, the published `VQA_RAD Dataset Public.json`, or the parquet files of the Hub's copies."""
    files = [Path(source.path) / name for name in _VQA_RAD_FILES]
    return [str(file) for file in files if file.is_file()][:1] or source.files((".parquet",), recursive=True)


def vqa_rad_rows(shard: str, source: Source) -> Iterator[Entry]:
    """VQA-RAD's questions; those whose image is asked about in the other split too are marked as a known leak."""
    if shard.endswith(".parquet"):
        yield from hub_rows(shard, source)
        return

    def records() -> Iterator[Record]:
        for place, record in json_records(shard):
            # The published file tells the split by the phrase type: freeform, para, test_freeform, test_para.
            if isinstance(record, dict) and str(record.get("phrase_type")).startswith("test"):
                record.setdefault("split", "test")
            yield place, record

    def row_of(record: dict[str, Any], place: str, split: str) -> dict[str, Any]:
        folder = Path(shard).parent / ("VQA_RAD Image Folder" if "image_name" in record else "")
        image = Path(source.images or folder) / required(record, place, "image", "image_name")
        return question_row(record, place, split, picture(image), source.layout)

    yield from convert(records(), source, "train", row_of)


def slake_rows(shard: str, source: Source) -> Iterator[Entry]:
    """SLAKE's questions; only the English ones, unless `where` says something of q_lang."""
    folder = Path(source.images or Path(shard).parent / "imgs")
    source = dataclasses.replace(source, where={"q_lang": "en", **(source.where or {})})

    def row_of(record: dict[str, Any], place: str, split: str) -> dict[str, Any]:
        image = picture(folder / required(record, place, "img_name"))
        return question_row(record, place, split, image, source.layout)

    yield from convert(json_records(shard), source, source.split_of(shard), row_of)


def pathvqa_shards(source: Source) -> list[str]:
    """The parquet files of the Hub's copies; raises ValueError for the original pickles, which run code when read."""
    folder = Path(source.path)
    pickles = [folder] if folder.suffix == ".pkl" else sorted(folder.rglob("*.pkl"))
    if pickles and not any(folder.rglob("*.parquet")):
        raise ValueError(
            f"{pickles[0]}: a pickle can run any code when it is read, so it is not: take PathVQA's parquet files "
            "(columns image, question, answer)"
        )
    return source.files((".parquet",), recursive=True)


def hub_rows(shard: str, source: Source) -> Iterator[Entry]:
    """Questions of a parquet file with the columns image, question and answer, as on the Hub."""

    def row_of(record: dict[str, Any], place: str, split: str) -> dict[str, Any]:
        image = required(record, place, "image")
        content = image.get("bytes") if isinstance(image, dict) else None
        if content is None:
            raise ValueError(f"{place}: expected an image with its bytes, got {image!r}")
        # The Hub's copies repeat an image for each of its questions, so its content tells which it is.
        digest = hashlib.sha256(content).hexdigest()[:16]
        image = {"path": f"{place}, image {image.get('path') or digest}", "bytes": content}
        return question_row({**record, "id": place}, place, split, image, source.layout, patient=digest)

    yield from convert(parquet_records(shard), source, source.split_of(shard), row_of)


def omnimedvqa_shards(source: Source) -> list[str]:
    """The JSON files below `QA_information`, or of the folder or pattern that is given."""
    folder = Path(source.path)
    if not folder.is_dir():
        return source.files((".json",))
    inside = folder / "QA_information"
    return sorted(map(str, (inside if inside.is_dir() else folder).rglob("*.json")))


def omnimedvqa_rows(shard: str, source: Source) -> Iterator[Entry]:
    """OmniMedVQA's multiple-choice questions, all of the split test: it is published to measure by."""
    above = [folder.parent for folder in Path(shard).absolute().parents if folder.name == "QA_information"]
    base = Path(source.images or (above or [Path(shard).parent])[0])

    def row_of(record: dict[str, Any], place: str, split: str) -> dict[str, Any]:
        image = picture(base / required(record, place, "image_path"))
        return question_row(record, place, split, image, str(record.get("dataset") or source.name))

    yield from convert(json_records(shard), source, "test", row_of)


def _looks_like_vqa_rad(path: Path, record: Mapping[str, Any]) -> bool:
    if path.is_dir():
        return any((path / name).is_file() for name in _VQA_RAD_FILES)
    return path.suffix != ".parquet" and {"question", "answer"} <= record.keys() and "img_name" not in record


def _looks_like_slake(path: Path, record: Mapping[str, Any]) -> bool:
    return {"img_name", "qid"} <= record.keys()


def _looks_like_pathvqa(path: Path, record: Mapping[str, Any]) -> bool:
    return path.suffix == ".pkl" or path.suffix == ".parquet" and {"image", "question", "answer"} <= record.keys()


def _looks_like_omnimedvqa(path: Path, record: Mapping[str, Any]) -> bool:
    return (path / "QA_information").is_dir() or {"gt_answer", "image_path"} <= record.keys()


register(Layout("vqa_rad", "conversations", vqa_rad_shards, vqa_rad_rows, _looks_like_vqa_rad))
register(Layout("slake", "conversations", lambda source: source.files((".json",)), slake_rows, _looks_like_slake))
register(Layout("pathvqa", "conversations", pathvqa_shards, hub_rows, _looks_like_pathvqa))
register(Layout("omnimedvqa", "conversations", omnimedvqa_shards, omnimedvqa_rows, _looks_like_omnimedvqa))
