"""How the files of each layout are read as items."""

import ast
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsight.evaluation.items import Item, Words, relative, wordings
from medsight.training.data.records import as_text, json_records, parquet_records, required
from medsight.training.data.schema import IMAGE_MARKER


if TYPE_CHECKING:
    from medsight.evaluation.benchmarks import Benchmark

YES_NO = ("yes", "no")
CLOSED, OPEN = "CLOSED", "OPEN"
CODE = re.compile(r"\[C\d+_\d+\]|\[SEG\]")
NEEDED_FIELDS = ("id", "question", "answer", "image", "masks")
OPTIONAL_FIELDS = ("target", "dataset", "modality", "site", "patient", "label_origin")


def region_rows(benchmark: "Benchmark", path: Path) -> Iterator[dict[str, Any]]:
    """Rows of `REGION_FEATURES` of the benchmark's split; the first bad one raises."""
    from medsight.training.data.sources import Source, iterate

    for item in iterate(Source("biomedparse", str(path), split=benchmark.split)):
        if item.error is not None:
            raise item.error
        assert item.row is not None
        yield item.row


def spacings(path: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """Pixel sizes in mm by (image, target), where a manifest tells them of a picture or of an isotropic volume."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for manifest in [path] if path.is_file() else [path / "manifest.jsonl", *sorted(path.glob("*/manifest.jsonl"))]:
        for _, record in json_records(manifest) if manifest.is_file() else ():
            if isinstance(record, ValueError) or not isinstance(record.get("voxel_mm"), list):
                continue
            image, target = record.get("image"), record.get("target")
            if not isinstance(image, str) or not isinstance(target, str):
                continue  # the rows' own reader says so
            size = [float(value) for value in record["voxel_mm"]]
            # A slice of a volume with unequal voxels may lie along any axis, so its pixels' size is not known.
            if len(size) == 2 or (len(size) == 3 and len(set(size)) == 1):
                found[str(manifest.parent / image), target] = (size[0], size[1])
    return found


def _segment_items(benchmark: "Benchmark", path: Path, words: Words) -> tuple[list[Item], int]:
    """One row per image and structure, absent ones too; or, for a diagnose task, per image with a diagnosis."""
    if benchmark.task == "diagnose":
        return _diagnose_items(benchmark, path, words)
    sizes, items = spacings(path), []
    datasets = set()
    for row in region_rows(benchmark, path):
        datasets.add(row["dataset"])
        image = relative(row["image"]["path"], path)
        for target in [*dict.fromkeys(row["targets"]), *row["absent"]]:
            identity = f"{image}#{target}"
            masks = [mask for mask, name in zip(row["masks"], row["targets"], strict=True) if name == target]
            items.append(
                Item(
                    id=identity,
                    prompt=words.prompt(identity, _fields(row, target)),
                    images=(row["image"],),
                    target=target,
                    absent=not masks,
                    masks=tuple(masks),
                    spacing_mm=sizes.get((row["image"]["path"], target)),
                    **_origin(row),
                )
            )
    return items, len(datasets)


def _diagnose_items(benchmark: "Benchmark", path: Path, words: Words) -> tuple[list[Item], int]:
    from medsight.evaluation.diagseg import diagnosis_of

    sizes, items = spacings(path), []
    datasets = set()
    for row in region_rows(benchmark, path):
        diagnosis = diagnosis_of(row)
        if diagnosis is None:
            continue
        datasets.add(row["dataset"])
        identity = relative(row["image"]["path"], path)
        target = " and ".join(diagnosis.targets) or (row["absent"][0] if row["absent"] else diagnosis.answer)
        items.append(
            Item(
                id=identity,
                prompt=words.prompt(identity, _fields(row, target)),
                images=(row["image"],),
                answer=diagnosis.answer,
                answer_type=OPEN,
                target=target,
                absent=not diagnosis.masks,
                masks=tuple(row["masks"][index] for index in diagnosis.masks),
                spacing_mm=sizes.get((row["image"]["path"], target)),
                **_origin(row),
            )
        )
    return items, len(datasets)


def _fields(row: Mapping[str, Any], target: str) -> dict[str, str]:
    from medsight.training.data.wording import with_article

    modality = wordings().modality(row["modality"])
    article = with_article(modality)
    return {
        "target": target,
        "a_target": with_article(target),
        "modality": modality,
        "a_modality": article,
        "A_modality": article[0].upper() + article[1:],
        "site": row["site"] or "",
    }


def _origin(row: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: row.get(name) or "-" for name in ("dataset", "modality", "site")}
    return {**known, "patient": row.get("patient"), "label_origin": row.get("label_origin")}


def _question_items(benchmark: "Benchmark", path: Path, words: Words) -> tuple[list[Item], int]:
    """Questions of VQA-RAD, SLAKE, PathVQA and OmniMedVQA, by the readers of the training data."""
    from medsight.training.data.sources import LAYOUTS, Source

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
                    **{**_origin(row), "patient": relative(row["patient"], path)},
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
                    **{**_origin(told), "patient": told["patient"] or image},
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
        raise ValueError(
            f"{place}: benchmark {benchmark.name} expects {', '.join(missing)}, and the record has "
            f"{', '.join(map(repr, record))}; a YAML file with '{benchmark.name}: {{like: {benchmark.name}, fields: "
            "{NAME: FIELD}}' for --benchmark says what they are called"
        )
    return told


def _annotated_items(benchmark: "Benchmark", path: Path, words: Words) -> tuple[list[Item], int]:
    """What `medsight data annotate` writes: questions, masks, and the codes of the masks, which its answers cite."""
    from medsight.training.data.sources import Source, iterate

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
                codes=tuple(CODE.findall(answer)),
                **_origin(row),
            )
        )
    return items, len({item.dataset for item in items})


READERS: dict[str, Callable[["Benchmark", Path, Words], tuple[list[Item], int]]] = {
    "biomedparse": _segment_items,
    "vqa_rad": _question_items,
    "slake": _question_items,
    "pathvqa": _question_items,
    "omnimedvqa": _question_items,
    "mmmu": _mmmu_items,
    "mecovqa": _mecovqa_items,
    "diagseg": _diagseg_items,
    "annotated": _annotated_items,
}
