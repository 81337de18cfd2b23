"""What a benchmark asks, as cases: rows of `medsight.data`, and files that only ever measure."""

import ast
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medsight.data.conversations import cited_codes
from medsight.data.records import Record, as_text, json_records, parquet_records, required
from medsight.data.schema import IMAGE_MARKER
from medsight.data.sources import Source, find_layout, iterate, kind_of

from .benchmarks import OPTIONAL_FIELDS, Benchmark, load_declarations
from .cases import CLOSED, OPEN, Case, Words, origin_of, relative, wordings
from .region_cases import region_cases


YES_NO = ("yes", "no")
Reader = Callable[[Benchmark, Path, Words], tuple[list[Case], int]]


class NoRowsError(ValueError):
    """The data hold no row that a benchmark asks about."""


def read_cases(
    benchmark: Benchmark, path: str | Path, held_out_prompts: bool = False, seed: int = 0
) -> tuple[list[Case], int]:
    """All cases of a benchmark, in the order of its files; pictures are opened where an answer lies in them alone.

    Args:
        path: the folder, or file, with the benchmark's data.
        held_out_prompts: ask in wordings that training never saw, where the benchmark has an intent.
        seed: of the choice among them.

    Returns:
        The cases, and how many files they came from.

    Raises:
        FileNotFoundError: the data is not there; see `Benchmark.check_present`.
        NoRowsError: there is no row for it.
        ValueError: a row is bad, two rows have one id, or there are no held-out wordings for this benchmark.
    """
    path = Path(path)
    benchmark.check_present(path)
    words = Words(benchmark.prompt, held_out_wordings(benchmark) if held_out_prompts else (), seed)
    reader = TEST_READERS.get(benchmark.layout)
    if reader is None:
        source = Source(benchmark.layout, str(path), split=benchmark.split)
        reader = region_cases if kind_of(source) == "regions" else _question_cases
    cases, files = reader(benchmark, path, words)
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            raise ValueError(f"{path}: two rows have the id {case.id!r}")
        seen.add(case.id)
    if not cases:
        raise NoRowsError(f"{path}: no row of the split {benchmark.split!r} for the benchmark {benchmark.name}")
    return cases, files


def held_out_wordings(benchmark: Benchmark) -> tuple[str, ...]:
    """The wordings of a benchmark's intent that training never uses.

    Raises:
        ValueError: the benchmark asks the data's own questions.
    """
    if benchmark.intent is None:
        raise ValueError(f"benchmark {benchmark.name} asks the data's own questions: it has no held-out prompts")
    return tuple(wordings().held_out_prompts[benchmark.intent])


def _question_cases(benchmark: Benchmark, path: Path, words: Words) -> tuple[list[Case], int]:
    """Conversations of one question and its answer."""
    source = Source(benchmark.layout, str(path), split=benchmark.split)
    layout = find_layout(source.layout)
    shards, cases = layout.shards(source), []
    pictures: dict[bytes, dict[str, Any]] = {}
    for shard in shards:
        stem = f"{relative(shard, path)}:" if len(shards) > 1 else ""
        for entry in layout.rows(shard, source):
            row = entry.checked()
            question, answer = _question_and_answer(row, entry.place)
            number = row["id"].replace(str(path), "", 1).lstrip("/") if shard.endswith(".parquet") else row["id"]
            by_answer = CLOSED if answer.strip().lower().rstrip(".") in YES_NO else OPEN
            patient = None if row["patient"] is None else relative(row["patient"], path)
            cases.append(
                Case(
                    id=f"{stem}{number}",
                    prompt=words.prompt(number, {"question": question}, len(row["images"])),
                    images=tuple(_held_once(image, pictures) for image in row["images"]),
                    answer=answer,
                    answer_type=row["answer_type"] or by_answer,
                    options=tuple(row["options"]),
                    **{**origin_of(row), "patient": patient},
                )
            )
    return cases, len(shards)


def _question_and_answer(row: Mapping[str, Any], place: str) -> tuple[str, str]:
    """Their texts, without the markers of images that stand before the question."""
    if len(row["messages"]) != 2:
        raise ValueError(f"{place}: expected a question and its answer, got {len(row['messages'])} messages")
    question, answer = (message["content"] for message in row["messages"])
    return re.sub(rf"^({IMAGE_MARKER}\n)+", "", question), answer


def _held_once(picture: dict[str, Any], known: dict[bytes, dict[str, Any]]) -> dict[str, Any]:
    """The first picture with the same bytes: parquet files repeat an image for each of its questions."""
    if picture["bytes"] is None:
        return picture
    return known.setdefault(hashlib.sha256(picture["bytes"]).digest(), picture)


def _annotated_cases(benchmark: Benchmark, path: Path, words: Words) -> tuple[list[Case], int]:
    """What `medsight data annotate` writes: questions, masks, and the codes of the masks, which its answers cite."""
    cases = []
    for entry in iterate(Source("parquet", str(path), split=benchmark.split)):
        row = entry.checked()
        question, _ = _question_and_answer(row, entry.place)
        targets = [target for target in dict.fromkeys(row["targets"]) if target]
        cases.append(
            Case(
                id=row["id"],
                prompt=words.prompt(row["id"], {"question": question}, len(row["images"])),
                images=tuple(row["images"]),
                target=" and ".join(targets) or None,
                absent=not row["masks"],
                masks=tuple(row["masks"]),
                codes=tuple(cited_codes(row["messages"])),
                **origin_of(row),
            )
        )
    return cases, len({case.dataset for case in cases})


def _checked(records: Iterator[Record]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Places and records; the first bad one raises."""
    for place, record in records:
        if isinstance(record, ValueError):
            raise record
        yield place, record


def _json_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.json"))


def _pictures(folder: Path, names: Sequence[str]) -> tuple[dict[str, Any], ...]:
    return tuple({"path": str(folder / name), "bytes": None} for name in names)


def _mmmu_cases(benchmark: Benchmark, path: Path, words: Words) -> tuple[list[Case], int]:
    """MMMU's parquet files, one folder per subject; "<image 2>" in a question is where its second image stands."""
    cases = []
    files = sorted(path.glob("*/validation-*.parquet"))
    for file in files:
        for place, record in _checked(parquet_records(file)):
            question = as_text(required(record, place, "question"), place, "question")
            try:
                options = [str(option) for option in ast.literal_eval(record.get("options") or "[]")]
            except (ValueError, SyntaxError) as error:
                raise ValueError(f"{place}: expected a list in 'options', got {record['options']!r}") from error
            lines = [f"{letter}. {option}" for letter, option in zip("ABCDEFGHIJ", options, strict=False)]
            text = "\n".join([question, *lines])
            images = []
            for number in re.findall(r"<image (\d)>", text) or ["1"]:
                image = record.get(f"image_{number}")
                if not isinstance(image, dict) or image.get("bytes") is None:
                    raise ValueError(f"{place}: expected an image with its bytes in 'image_{number}', got {image!r}")
                images.append({"path": f"{place}, image {number}", "bytes": image["bytes"]})
            text = re.sub(r"<image \d>", IMAGE_MARKER, text)
            identity = as_text(required(record, place, "id"), place, "id")
            cases.append(
                Case(
                    id=identity,
                    prompt=words.prompt(identity, {"question": text}, len(images)),
                    images=tuple(images),
                    answer=as_text(required(record, place, "answer"), place, "answer"),
                    answer_type=CLOSED if options else OPEN,
                    options=tuple(options),
                    dataset=file.parent.name,
                )
            )
    return cases, len(files)


def _mecovqa_cases(benchmark: Benchmark, path: Path, words: Words) -> tuple[list[Case], int]:
    """MeCoVQA-G: LLaVA's conversations, where an answer names its mask's file: "... <SEG> <mask>masks/x.png</mask>".

    Files are relative to the JSON's folder; a name tells modality and data set ("ct_00--AbdomenCT1K--...").
    """
    files, cases = _json_files(path), []
    for file in files:
        for number, (place, record) in enumerate(_checked(json_records(file))):
            image = as_text(required(record, place, "image"), place, "image")
            turns = [str(turn.get("value", "")) for turn in required(record, place, "conversations")]
            masks = re.findall(r"<mask>(.*?)</mask>", " ".join(turns[1:]))
            if len(turns) < 2 or not masks:
                raise ValueError(f"{place}: expected a question and an answer with <mask>FILE</mask>, got {turns}")
            # <region> ... </region> marks what is asked for; nothing of it is for the model to read.
            question = re.sub(r"<image>|</?region>|<SEG>", "", turns[0]).strip()
            parts = Path(image).name.split("--")
            cases.append(
                Case(
                    id=f"{record.get('id', number)}:{image}",
                    prompt=words.prompt(image, {"question": question}),
                    images=_pictures(file.parent, [image]),
                    masks=_pictures(file.parent, masks),
                    dataset=parts[1] if len(parts) > 1 else "-",
                    patient=image,
                    modality=re.sub(r"_\d+$", "", parts[0]) if len(parts) > 1 else "-",
                )
            )
    return cases, len(files)


def _diagseg_cases(benchmark: Benchmark, path: Path, words: Words) -> tuple[list[Case], int]:
    """A JSON record a case, by the names of the declaration's `fields`; files are relative to the JSON's folder."""
    files, cases = _json_files(path), []
    for file in files:
        for place, record in _checked(json_records(file)):
            fields = _named_fields(benchmark, record, place)
            identity, question, answer, image = (
                as_text(fields[name], place, name) for name in ("id", "question", "answer", "image")
            )
            masks = [fields["masks"]] if isinstance(fields["masks"], str) else fields["masks"] or []
            if not isinstance(masks, list) or not all(isinstance(mask, str) for mask in masks):
                raise ValueError(f"{place}: expected the path of a mask or a list of paths, got {fields['masks']!r}")
            cases.append(
                Case(
                    id=identity,
                    prompt=words.prompt(identity, {"question": question}),
                    images=_pictures(file.parent, [image]),
                    answer=answer,
                    answer_type=OPEN,
                    target=fields["target"] or answer,
                    absent=not masks,
                    masks=_pictures(file.parent, masks),
                    **{**origin_of(fields), "patient": fields["patient"] or image},
                )
            )
    return cases, len(files)


def _named_fields(benchmark: Benchmark, record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A record's values by our names; None for those of `OPTIONAL_FIELDS` that it has not.

    Raises:
        ValueError: needed fields are missing; the message names them, those that are there, and the way out.
    """
    values: dict[str, Any] = dict.fromkeys(OPTIONAL_FIELDS)
    missing = []
    for name, spelled in benchmark.fields.items():
        spellings = [spelled] if isinstance(spelled, str) else spelled
        found = next((field for field in spellings if field in record), None)
        if found is not None:
            values[name] = record[found]
        elif name not in OPTIONAL_FIELDS:
            missing.append(f"{' or '.join(map(repr, spellings))} ({name})")
    if missing:
        name, fields = benchmark.name, "fields: {NAME: FIELD}"
        way_out = f"'{fields}' of {name} in its YAML file"
        if name in load_declarations():
            way_out = f"a YAML file with '{name}: {{like: {name}, {fields}}}' for --benchmark"
        raise ValueError(
            f"{place}: benchmark {name} expects {', '.join(missing)}, and the record has "
            f"{', '.join(map(repr, record))}; {way_out} says what they are called"
        )
    return values


TEST_READERS: dict[str, Reader] = {
    "annotated": _annotated_cases,
    "diagseg": _diagseg_cases,
    "mecovqa": _mecovqa_cases,
    "mmmu": _mmmu_cases,
}
