"""Questions about medical images, in the layouts in which VQA-RAD, SLAKE, PathVQA and OmniMedVQA are distributed.

Each question is a conversation of one turn, "<image>" and the question; where there are options, one a line.
"""

import hashlib
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..records import as_text, convert, json_records, parquet_records, required
from ..registry import Entry, Layout, Source, register
from ..schema import IMAGE_MARKER, conversation_row
from ..splits import canonical_split


_VQA_RAD_FILES = ("questions.jsonl", "VQA_RAD Dataset Public.json")


def question_row(
    record: dict[str, Any],
    place: str,
    *,
    number: Any,
    image: dict[str, Any],
    answer: str = "answer",
    **origin: Any,
) -> dict[str, Any]:
    """A row of conversations from the record of a question.

    Args:
        number: what the question is called.
        answer: the field of the record that has the answer.
        origin: dataset and split, and modality, site, patient if known.

    Raises:
        ValueError: question or answer is missing or empty, or the answer is none of the options.
    """
    asked = as_text(required(record, place, "question"), place, "question")
    options = [(letter, record.get(f"option_{letter}")) for letter in string.ascii_uppercase]
    given = [(letter, as_text(option, place, f"option_{letter}")) for letter, option in options if option is not None]
    said = as_text(required(record, place, answer), place, answer)
    if given and said.strip().casefold() not in {option.strip().casefold() for _, option in given}:
        raise ValueError(f"{place}: the answer {said!r} is none of the options {[option for _, option in given]}")
    stated = str(record.get("answer_type") or "").strip().upper()
    lines = [asked, *(f"{letter}. {option}" for letter, option in given)]
    messages = [
        {"role": "user", "content": f"{IMAGE_MARKER}\n" + "\n".join(lines)},
        {"role": "assistant", "content": said},
    ]
    known = {
        "answer_type": "CLOSED" if given else stated if stated in ("CLOSED", "OPEN") else None,
        "options": [option for _, option in given],
        "patient": image["path"],
    }
    return conversation_row(str(number), [image], messages, **{**known, **origin})


def vqa_rad_shards(source: Source) -> list[str]:
    """`questions.jsonl`, the published `VQA_RAD Dataset Public.json`, or the parquet files of the Hub's copies."""
    folder = Path(source.path)
    for name in _VQA_RAD_FILES:
        if (folder / name).is_file():
            return [str(folder / name)]
    if folder.is_file():
        return [str(folder)]
    return source.files((".parquet",), recursive=True)


def vqa_rad_rows(shard: str, source: Source) -> Iterator[Entry]:
    """VQA-RAD's questions; those whose image is asked about in the other split too are marked as a known leak."""
    if shard.endswith(".parquet"):
        yield from hub_rows(shard, source)
        return
    folder = Path(shard).parent

    def split(record: dict[str, Any]) -> str:
        # The published file tells the split by the phrase type: freeform, para, test_freeform, test_para.
        return record.get("split") or ("test" if str(record.get("phrase_type")).startswith("test") else "train")

    def row_of(record: dict[str, Any], place: str) -> dict[str, Any]:
        if "image_name" in record:
            image = (Path(source.images) if source.images else folder / "VQA_RAD Image Folder") / record["image_name"]
        else:
            image = Path(source.images or folder) / required(record, place, "image")
        return question_row(
            record,
            place,
            number=required(record, place, "id", "qid"),
            image={"path": str(image), "bytes": None},
            dataset=source.layout,
            site=record.get("site") or record.get("image_organ"),
            split=canonical_split(split(record)),
        )

    def leaks(record: dict[str, Any]) -> bool:
        return record.get("image_in_test") is True

    yield from convert(json_records(shard), row_of, lambda record: source.takes(record, split(record)), leaks)


def slake_rows(shard: str, source: Source) -> Iterator[Entry]:
    """SLAKE's questions; only the English ones, unless `where` says something of q_lang."""
    folder = Path(source.images) if source.images else Path(shard).parent / "imgs"
    split = source.split_of(shard) or source.split or "train"

    def takes(record: dict[str, Any]) -> bool:
        return source.takes(record, split) and ("q_lang" in (source.where or {}) or record.get("q_lang", "en") == "en")

    def row_of(record: dict[str, Any], place: str) -> dict[str, Any]:
        return question_row(
            record,
            place,
            number=required(record, place, "qid"),
            image={"path": str(folder / required(record, place, "img_name")), "bytes": None},
            dataset=source.layout,
            modality=record.get("modality"),
            site=record.get("location"),
            split=split,
        )

    yield from convert(json_records(shard), row_of, takes)


def pathvqa_shards(source: Source) -> list[str]:
    """The parquet files of the Hub's copies; raises ValueError for the original pickles, which run code when read."""
    folder = Path(source.path)
    pickles = sorted(folder.rglob("*.pkl")) if folder.is_dir() else [folder] if folder.suffix == ".pkl" else []
    if pickles and not (folder.is_dir() and any(folder.rglob("*.parquet"))):
        raise ValueError(
            f"{pickles[0]}: a pickle can run any code when it is read, so it is not: take PathVQA's parquet files "
            "(columns image, question, answer)"
        )
    return source.files((".parquet",), recursive=True)


def hub_rows(shard: str, source: Source) -> Iterator[Entry]:
    """Questions of a parquet file with the columns image, question and answer, as on the Hub."""
    split = source.split_of(shard) or source.split or "train"

    def row_of(record: dict[str, Any], place: str) -> dict[str, Any]:
        image = required(record, place, "image")
        content = image.get("bytes") if isinstance(image, dict) else None
        if content is None:
            raise ValueError(f"{place}: expected an image with its bytes, got {image!r}")
        # The Hub's copies repeat an image for each of its questions, so its content tells which it is.
        digest = hashlib.sha256(content).hexdigest()[:16]
        return question_row(
            record,
            place,
            number=place,
            image={"path": f"{place}, image {image.get('path') or digest}", "bytes": content},
            dataset=source.layout,
            split=split,
            patient=digest,
        )

    yield from convert(parquet_records(shard), row_of, lambda record: source.takes(record, split))


def omnimedvqa_shards(source: Source) -> list[str]:
    """The JSON files below `QA_information`, or of the folder or pattern that is given."""
    folder = Path(source.path)
    if (folder / "QA_information").is_dir():
        return sorted(str(file) for file in (folder / "QA_information").rglob("*.json"))
    if folder.is_dir():
        return sorted(str(file) for file in folder.rglob("*.json"))
    return source.files((".json",))


def omnimedvqa_rows(shard: str, source: Source) -> Iterator[Entry]:
    """OmniMedVQA's multiple-choice questions, all of the split test: it is published to measure by."""
    above = [folder.parent for folder in Path(shard).absolute().parents if folder.name == "QA_information"]
    base = Path(source.images) if source.images else above[0] if above else Path(shard).parent

    def row_of(record: dict[str, Any], place: str) -> dict[str, Any]:
        return question_row(
            record,
            place,
            number=required(record, place, "question_id"),
            answer="gt_answer",
            image={"path": str(base / required(record, place, "image_path")), "bytes": None},
            dataset=str(record.get("dataset") or source.name),
            # A few entries of the published files spell the key without "_type".
            modality=record.get("modality_type") or record.get("modality"),
            split="test",
        )

    yield from convert(json_records(shard), row_of, lambda record: source.takes(record, "test"))


def _looks_like_vqa_rad(path: Path, record: Mapping[str, Any] | None) -> bool:
    if path.is_dir():
        return any((path / name).is_file() for name in _VQA_RAD_FILES)
    keys = set(record or {})
    return path.suffix != ".parquet" and {"question", "answer"} <= keys and "img_name" not in keys


def _looks_like_slake(path: Path, record: Mapping[str, Any] | None) -> bool:
    return record is not None and {"img_name", "qid"} <= set(record)


def _looks_like_pathvqa(path: Path, record: Mapping[str, Any] | None) -> bool:
    return path.suffix == ".pkl" or path.suffix == ".parquet" and {"image", "question", "answer"} <= set(record or {})


def _looks_like_omnimedvqa(path: Path, record: Mapping[str, Any] | None) -> bool:
    return (path / "QA_information").is_dir() or (record is not None and {"gt_answer", "image_path"} <= set(record))


register(Layout("vqa_rad", "conversations", vqa_rad_shards, vqa_rad_rows, _looks_like_vqa_rad))
register(Layout("slake", "conversations", lambda source: source.files((".json",)), slake_rows, _looks_like_slake))
register(Layout("pathvqa", "conversations", pathvqa_shards, hub_rows, _looks_like_pathvqa))
register(Layout("omnimedvqa", "conversations", omnimedvqa_shards, omnimedvqa_rows, _looks_like_omnimedvqa))
