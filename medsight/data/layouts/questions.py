"""Questions about medical images, in the layouts in which VQA-RAD, SLAKE, PathVQA and OmniMedVQA are distributed.

Each question is a conversation of one turn, "<image>" and the question; where there are options, one a line.
"""

import hashlib
import string
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import Item, as_text, convert, json_records, parquet_records, required, source_files, split_of
from .schema import IMAGE_MARKER
from .splits import canonical_split


if TYPE_CHECKING:
    from .sources import Source


def question_row(
    record: dict[str, Any],
    place: str,
    *,
    number: Any,
    question: str,
    answer: str,
    image: dict[str, Any],
    **origin: Any,
) -> dict[str, Any]:
    """A row of `schema.CONVERSATION_FEATURES`; `origin` gives dataset and split, and modality, site, patient if known.

    Raises:
        ValueError: question or answer is missing or empty.
    """
    asked = as_text(required(record, place, question), place, question)
    options = [(letter, record.get(f"option_{letter}")) for letter in string.ascii_uppercase]
    given = [(letter, as_text(option, place, f"option_{letter}")) for letter, option in options if option is not None]
    said = as_text(required(record, place, answer), place, answer)
    if given and said.strip().casefold() not in {option.strip().casefold() for _, option in given}:
        raise ValueError(f"{place}: the answer {said!r} is none of the options {[option for _, option in given]}")
    lines = [asked, *(f"{letter}. {option}" for letter, option in given)]
    return {
        "id": str(number),
        "images": [image],
        "messages": [
            {"role": "user", "content": f"{IMAGE_MARKER}\n" + "\n".join(lines)},
            {"role": "assistant", "content": said},
        ],
        "masks": [],
        "targets": [],
        "modality": None,
        "site": None,
        "patient": image["path"],
        **origin,
    }


def vqa_rad_shards(source: "Source") -> list[str]:
    """`questions.jsonl`, the published `VQA_RAD Dataset Public.json`, or the parquet files of the Hub's copies."""
    folder = Path(source.path)
    for name in ("questions.jsonl", "VQA_RAD Dataset Public.json"):
        if (folder / name).is_file():
            return [str(folder / name)]
    if folder.is_file():
        return [str(folder)]
    return source_files(source, (".parquet",), recursive=True)


def vqa_rad_items(shard: str, source: "Source") -> Iterator[Item]:
    """VQA-RAD's questions; those whose image is asked about in the other split too are marked as a known leak."""
    if shard.endswith(".parquet"):
        yield from hub_items(shard, source)
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
            question="question",
            answer="answer",
            image={"path": str(image), "bytes": None},
            dataset=source.name,
            site=record.get("site") or record.get("image_organ"),
            split=canonical_split(split(record)),
        )

    def leaks(record: dict[str, Any]) -> bool:
        return record.get("image_in_test") is True

    yield from convert(json_records(shard), row_of, lambda record: source.takes(record, split(record)), leaks)


def slake_shards(source: "Source") -> list[str]:
    """`train.json`, `validation.json` (or validate.json) and `test.json`, as many as the split asks for."""
    return source_files(source, (".json",))


def slake_items(shard: str, source: "Source") -> Iterator[Item]:
    """SLAKE's questions; only the English ones, unless `where` says something of q_lang."""
    folder = Path(source.images) if source.images else Path(shard).parent / "imgs"
    split = split_of(shard, source) or source.split or "train"

    def takes(record: dict[str, Any]) -> bool:
        return source.takes(record, split) and ("q_lang" in (source.where or {}) or record.get("q_lang", "en") == "en")

    def row_of(record: dict[str, Any], place: str) -> dict[str, Any]:
        return question_row(
            record,
            place,
            number=required(record, place, "qid"),
            question="question",
            answer="answer",
            image={"path": str(folder / required(record, place, "img_name")), "bytes": None},
            dataset=source.name,
            modality=record.get("modality"),
            site=record.get("location"),
            split=split,
        )

    yield from convert(json_records(shard), row_of, takes)


def pathvqa_shards(source: "Source") -> list[str]:
    """The parquet files of the Hub's copies; raises ValueError for the original pickles, which run code when read."""
    folder = Path(source.path)
    pickles = sorted(folder.rglob("*.pkl")) if folder.is_dir() else [folder] if folder.suffix == ".pkl" else []
    if pickles and not (folder.is_dir() and any(folder.rglob("*.parquet"))):
        raise ValueError(
            f"{pickles[0]}: a pickle can run any code when it is read, so it is not: take PathVQA's parquet files "
            "(columns image, question, answer)"
        )
    return source_files(source, (".parquet",), recursive=True)


def hub_items(shard: str, source: "Source") -> Iterator[Item]:
    """Questions of a parquet file with the columns image, question and answer, as on the Hub."""
    split = split_of(shard, source) or source.split or "train"

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
            question="question",
            answer="answer",
            image={"path": f"{place}, image {image.get('path') or digest}", "bytes": content},
            dataset=source.name,
            split=split,
            patient=digest,
        )

    yield from convert(parquet_records(shard), row_of, lambda record: source.takes(record, split))


def omnimedvqa_shards(source: "Source") -> list[str]:
    """The JSON files below `QA_information`, or of the folder or pattern that is given."""
    folder = Path(source.path)
    if (folder / "QA_information").is_dir():
        return sorted(str(file) for file in (folder / "QA_information").rglob("*.json"))
    if folder.is_dir():
        return sorted(str(file) for file in folder.rglob("*.json"))
    return source_files(source, (".json",))


def omnimedvqa_items(shard: str, source: "Source") -> Iterator[Item]:
    """OmniMedVQA's multiple-choice questions, all of the split test: it is published to measure by."""
    above = [folder.parent for folder in Path(shard).absolute().parents if folder.name == "QA_information"]
    base = Path(source.images) if source.images else above[0] if above else Path(shard).parent

    def row_of(record: dict[str, Any], place: str) -> dict[str, Any]:
        return question_row(
            record,
            place,
            number=required(record, place, "question_id"),
            question="question",
            answer="gt_answer",
            image={"path": str(base / required(record, place, "image_path")), "bytes": None},
            dataset=str(record.get("dataset") or source.name),
            # A few entries of the published files spell the key without "_type".
            modality=record.get("modality_type") or record.get("modality"),
            split="test",
        )

    yield from convert(json_records(shard), row_of, lambda record: source.takes(record, "test"))
