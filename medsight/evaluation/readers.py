"""How the files of each layout are read as items."""

import ast
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsight.data.records import as_text, json_records, parquet_records, required
from medsight.data.schema import IMAGE_MARKER
from medsight.evaluation.items import CLOSED, OPEN, Item, Words, origin_of, relative
from medsight.evaluation.region_items import region_items
from processing_medsight.region_codes_medsight import find_codes


if TYPE_CHECKING:
    from medsight.evaluation.benchmarks import Benchmark

YES_NO = ("yes", "no")
NEEDED_FIELDS = ("id", "question", "answer", "image", "masks")
OPTIONAL_FIELDS = ("target", "dataset", "modality", "site", "patient", "label_origin")


def _question_items(benchmark: "Benchmark", path: Path, words: Words) -> tuple[list[Item], int]:
    """Questions of VQA-RAD, SLAKE, PathVQA and OmniMedVQA, by the readers of the training data."""
    from medsight.data.sources import LAYOUTS, Source

    source = Source(benchmark.layout, str(path), split=benchmark.split)
    layout, items = LAYOUTS[source.layout], []
    shards = layout.shards(source)
    pictures: dict[bytes, dict[str, Any]] = {}
    for shard in shards:
        told = _told(shard)
        for entry in layout.items(shard, source):
            if entry.error is not None:
                raise entry.error
            row = entry.row
            assert row is not None
            question, answer = (message["content"] for message in row["messages"])
            record = told.get(row["id"], {})
            stem = f"{relative(shard, path)}:" if len(shards) > 1 else ""
            number = row["id"].replace(str(path), "", 1).lstrip("/") if shard.endswith(".parquet") else row["id"]
            closed = str(record.get("answer_type") or "").strip().upper()
            if closed not in (CLOSED, OPEN):
                closed = CLOSED if answer.strip().lower().rstrip(".") in YES_NO else OPEN
            options = [record[key] for key in sorted(record) if re.fullmatch(r"option_[A-Z]", key) and record[key]]
            text = question.removeprefix(f"{IMAGE_MARKER}\n")
            items.append(
                Item(
                    id=f"{stem}{number}",
                    prompt=words.prompt(number, {"question": text}),
                    images=tuple(_kept_once(image, pictures) for image in row["images"]),
                    answer=answer,
                    answer_type=CLOSED if options else closed,
                    options=tuple(map(str, options)),
                    **{**origin_of(row), "patient": relative(row["patient"], path)},
                )
            )
    return items, len(shards)


def _kept_once(picture: dict[str, Any], known: dict[bytes, dict[str, Any]]) -> dict[str, Any]:
    """The first picture with the same bytes: parquet files repeat an image for each of its questions."""
    if picture["bytes"] is None:
        return picture
    return known.setdefault(hashlib.sha256(picture["bytes"]).digest(), picture)


def _told(shard: str) -> dict[str, dict[str, Any]]:
    """What the records of a JSON file say beside question and answer, by their number."""
    if shard.endswith(".parquet"):
        return {}
    records: dict[str, dict[str, Any]] = {}
    for _, record in json_records(shard):
        if not isinstance(record, ValueError):
            number = next((record[key] for key in ("id", "qid", "question_id") if record.get(key) is not None), None)
            records[str(number)] = record
    return records


def _mmmu_items(benchmark: "Benchmark", path: Path, words: Words) -> tuple[list[Item], int]:
    """MMMU's parquet files, one folder per subject; "<image 2>" in a question is where its second image stands."""
    items = []
    files = sorted(path.glob("*/validation-*.parquet"))
    for file in files:
        for place, record in parquet_records(file):
            if isinstance(record, ValueError):
                raise record
            question = as_text(required(record, place, "question"), place, "question")
            try:
                options = [str(option) for option in ast.literal_eval(record.get("options") or "[]")]
            except (ValueError, SyntaxError) as error:
                raise ValueError(f"{place}: expected a list in 'options', got {record['options']!r}") from error
            lines = [f"{letter}. {option}" for letter, option in zip("ABCDEFGHIJ", options, strict=False)]
            text = "\n".join([question, *lines])
            numbers = re.findall(r"<image (\d)>", text)
            images = []
            for number in numbers or ["1"]:
                image = record.get(f"image_{number}")
                if not isinstance(image, dict) or image.get("bytes") is None:
                    raise ValueError(f"{place}: expected an image with its bytes in 'image_{number}', got {image!r}")
                images.append({"path": f"{place}, image {number}", "bytes": image["bytes"]})
            text = re.sub(r"<image \d>", IMAGE_MARKER, text)
            identity = as_text(required(record, place, "id"), place, "id")
            items.append(
                Item(
                    id=identity,
                    prompt=words.prompt(identity, {"question": text}, len(images)),
                    images=tuple(images),
                    answer=as_text(required(record, place, "answer"), place, "answer"),
                    answer_type=CLOSED if options else OPEN,
                    options=tuple(options),
                    dataset=file.parent.name,
                )
            )
    return items, len(files)


def _mecovqa_items(benchmark: "Benchmark", path: Path, words: Words) -> tuple[list[Item], int]:
    """MeCoVQA-G: LLaVA's conversations, where an answer names its mask's file: "... <SEG> <mask>masks/x.png</mask>".

    Files are relative to the JSON's folder; a name tells modality and data set ("ct_00--AbdomenCT1K--...").
    """
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    items = []
    for file in files:
        for number, (place, record) in enumerate(json_records(file)):
            if isinstance(record, ValueError):
                raise record
            image = as_text(required(record, place, "image"), place, "image")
            turns = [str(turn.get("value", "")) for turn in required(record, place, "conversations")]
            masks = re.findall(r"<mask>(.*?)</mask>", " ".join(turns[1:]))
            if len(turns) < 2 or not masks:
                raise ValueError(f"{place}: expected a question and an answer with <mask>FILE</mask>, got {turns}")
            # <region> ... </region> marks what is asked for; nothing of it is for the model to read.
            question = re.sub(r"<image>|</?region>|<SEG>", "", turns[0]).strip()
            parts = Path(image).name.split("--")
            items.append(
                Item(
                    id=f"{record.get('id', number)}:{image}",
                    prompt=words.prompt(image, {"question": question}),
                    images=({"path": str(file.parent / image), "bytes": None},),
                    masks=tuple({"path": str(file.parent / mask), "bytes": None} for mask in masks),
                    dataset=parts[1] if len(parts) > 1 else "-",
                    patient=image,
                    modality=re.sub(r"_\d+$", "", parts[0]) if len(parts) > 1 else "-",
                )
            )
    return items, len(files)


def _diagseg_items(benchmark: "Benchmark", path: Path, words: Words) -> tuple[list[Item], int]:
    """A JSON record an item, by the names of the declaration's `fields`; files are relative to the JSON's folder."""
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    items = []
    for file in files:
        for place, record in json_records(file):
            if isinstance(record, ValueError):
                raise record
            told = _named_fields(benchmark, record, place)
            identity = as_text(told["id"], place, "id")
            question, answer = (as_text(told[name], place, name) for name in ("question", "answer"))
            image = as_text(told["image"], place, "image")
            masks = [told["masks"]] if isinstance(told["masks"], str) else told["masks"] or []
            if not isinstance(masks, list) or not all(isinstance(mask, str) for mask in masks):
                raise ValueError(f"{place}: expected the path of a mask or a list of paths, got {told['masks']!r}")
            items.append(
                Item(
                    id=identity,
                    prompt=words.prompt(identity, {"question": question}),
                    images=({"path": str(file.parent / image), "bytes": None},),
                    answer=answer,
                    answer_type=OPEN,
                    target=told["target"] or answer,
                    absent=not masks,
                    masks=tuple({"path": str(file.parent / mask), "bytes": None} for mask in masks),
                    **{**origin_of(told), "patient": told["patient"] or image},
                )
            )
    return items, len(files)


def _named_fields(benchmark: "Benchmark", record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A record's values by our names; None for those of `OPTIONAL_FIELDS` that it has not.

    Raises:
        ValueError: needed fields are missing; the message names them, those that are there, and the way out.
    """
    told: dict[str, Any] = dict.fromkeys(OPTIONAL_FIELDS)
    missing = []
    for name, given in benchmark.fields.items():
        called = [given] if isinstance(given, str) else given
        found = next((field for field in called if field in record), None)
        if found is not None:
            told[name] = record[found]
        elif name not in OPTIONAL_FIELDS:
            missing.append(f"{' or '.join(map(repr, called))} ({name})")
    if missing:
        from medsight.evaluation.benchmarks import load_declarations

        name, fields = benchmark.name, "fields: {NAME: FIELD}"
        way_out = f"'{fields}' of {name} in its YAML file"
        if name in load_declarations():
            way_out = f"a YAML file with '{name}: {{like: {name}, {fields}}}' for --benchmark"
        raise ValueError(
            f"{place}: benchmark {name} expects {', '.join(missing)}, and the record has "
            f"{', '.join(map(repr, record))}; {way_out} says what they are called"
        )
    return told


def _annotated_items(benchmark: "Benchmark", path: Path, words: Words) -> tuple[list[Item], int]:
    """What `medsight data annotate` writes: questions, masks, and the codes of the masks, which its answers cite."""
    from medsight.data.sources import Source, iterate

    items = []
    for entry in iterate(Source("parquet", str(path), split=benchmark.split)):
        if entry.error is not None:
            raise entry.error
        row = entry.row
        assert row is not None
        if len(row["messages"]) != 2:
            raise ValueError(f"{entry.place}: expected a question and its answer, got {len(row['messages'])} messages")
        question, answer = (message["content"] for message in row["messages"])
        targets = [target for target in dict.fromkeys(row["targets"]) if target]
        items.append(
            Item(
                id=row["id"],
                prompt=words.prompt(row["id"], {"question": question}, len(row["images"])),
                images=tuple(row["images"]),
                target=" and ".join(targets) or None,
                absent=not row["masks"],
                masks=tuple(row["masks"]),
                codes=tuple(find_codes(answer)),
                **origin_of(row),
            )
        )
    return items, len({item.dataset for item in items})


READERS: dict[str, Callable[["Benchmark", Path, Words], tuple[list[Item], int]]] = {
    "biomedparse": region_items,
    "vqa_rad": _question_items,
    "slake": _question_items,
    "pathvqa": _question_items,
    "omnimedvqa": _question_items,
    "mmmu": _mmmu_items,
    "mecovqa": _mecovqa_items,
    "diagseg": _diagseg_items,
    "annotated": _annotated_items,
}
