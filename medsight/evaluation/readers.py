"""What a benchmark asks, as cases: rows of `medsight.data`, and files that only ever measure."""

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medsight.data.conversations import cited_codes
from medsight.data.records import as_text, json_records, parquet_records, required
from medsight.data.schema import IMAGE_MARKER
from medsight.data.sources import Source, find_layout, iterate, kind_of, warn_of_shared_pictures

from .benchmarks import OPTIONAL_FIELDS, Benchmark
from .cases import CLOSED, OPEN, Case, Words, origin_of, relative, wordings
from .region_cases import region_cases, source_of


class NoRowsError(ValueError):
    """The data hold no row that a benchmark asks about."""


def read_cases(
    benchmark: Benchmark, path: str | Path, held_out_prompts: bool = False, seed: int = 0
) -> tuple[list[Case], int]:
    """All cases of a benchmark, in the order of its files, and how many files they came from.

    Pictures are opened where an answer lies in them alone. `held_out_prompts` are wordings that training never saw,
    drawn by the seed.

    Raises:
        FileNotFoundError: the data is not there; see `Benchmark.files_in`.
        NoRowsError: there is no row for it.
        ValueError: a row is bad, two rows have one id, or there are no held-out wordings for this benchmark.
    """
    path = Path(path)
    files: Sequence[str | Path]
    words = Words(benchmark.prompt, held_out_wordings(benchmark) if held_out_prompts else (), seed)
    if benchmark.layout in FILE_READERS:
        read, files = FILE_READERS[benchmark.layout], benchmark.files_in(path)
        cases = [case for file in map(Path, files) for case in read(benchmark, file, words)]
    else:
        source = source_of(benchmark, path)
        files = find_layout(source.layout).shards(source)
        warn_of_shared_pictures(source)
        read_rows = region_cases if kind_of(source) == "regions" else _question_cases
        cases = list(read_rows(benchmark, source, words))
    if not cases:
        raise NoRowsError(f"{path}: no row of the split {benchmark.split!r} for the benchmark {benchmark.name}")
    (identity, count), *_ = Counter(case.id for case in cases).most_common(1)
    if count > 1:
        raise ValueError(f"{path}: two rows have the id {identity!r}")
    return cases, len(files)


def held_out_wordings(benchmark: Benchmark) -> tuple[str, ...]:
    """The wordings of a benchmark's intent that training never uses; ValueError where it has no intent."""
    if benchmark.intent is None:
        raise ValueError(f"benchmark {benchmark.name} asks the data's own questions: it has no held-out prompts")
    return tuple(wordings().held_out_prompts[benchmark.intent])


def _question_cases(benchmark: Benchmark, source: Source, words: Words) -> Iterator[Case]:
    """Conversations of one question and its answer."""
    path, layout = Path(source.path), find_layout(source.layout)
    shards = layout.shards(source)
    pictures: dict[bytes, dict[str, Any]] = {}
    for shard in shards:
        stem = f"{relative(shard, path)}:" if len(shards) > 1 else ""
        for entry in layout.rows(shard, source):
            row = entry.checked()
            question, answer = _question_and_answer(row, entry.place)
            number = row["id"].replace(str(path), "", 1).lstrip("/") if shard.endswith(".parquet") else row["id"]
            by_answer = CLOSED if answer.strip().lower().rstrip(".") in ("yes", "no") else OPEN
            patient = None if row["patient"] is None else relative(row["patient"], path)
            yield Case(
                id=f"{stem}{number}",
                prompt=words.prompt(number, {"question": question}, len(row["images"])),
                images=tuple(_held_once(image, pictures) for image in row["images"]),
                answer=answer,
                answer_type=row["answer_type"] or by_answer,
                options=tuple(row["options"]),
                **{**origin_of(row), "patient": patient},
            )


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


def _annotated_cases(benchmark: Benchmark, file: Path, words: Words) -> Iterator[Case]:
    """What `medsight data annotate` writes: questions, masks, and the codes of the masks, which its answers cite."""
    for entry in iterate(Source("parquet", str(file), split=benchmark.split)):
        row = entry.checked()
        question, _ = _question_and_answer(row, entry.place)
        yield Case(
            id=row["id"],
            prompt=words.prompt(row["id"], {"question": question}, len(row["images"])),
            images=tuple(row["images"]),
            target=" and ".join(filter(None, dict.fromkeys(row["targets"]))) or None,
            absent=not row["masks"],
            masks=tuple(row["masks"]),
            codes=tuple(cited_codes(row["messages"])),
            **origin_of(row),
        )


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Places and records of a JSON or parquet file; the first bad one raises."""
    for place, record in parquet_records(file) if file.suffix == ".parquet" else json_records(file):
        if isinstance(record, ValueError):
            raise record
        yield place, record


def _pictures(folder: Path, names: Sequence[str]) -> tuple[dict[str, Any], ...]:
    return tuple({"path": str(folder / name), "bytes": None} for name in names)


def _mmmu_cases(benchmark: Benchmark, file: Path, words: Words) -> Iterator[Case]:
    """MMMU's parquet files, one folder per subject; "<image 2>" in a question is where its second image stands."""
    for place, record in _records(file):
        identity, question, answer = (
            as_text(required(record, place, name), place, name) for name in ("id", "question", "answer")
        )
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
        yield Case(
            id=identity,
            prompt=words.prompt(identity, {"question": text}, len(images)),
            images=tuple(images),
            answer=answer,
            answer_type=CLOSED if options else OPEN,
            options=tuple(options),
            dataset=file.parent.name,
        )


def _mecovqa_cases(benchmark: Benchmark, file: Path, words: Words) -> Iterator[Case]:
    """MeCoVQA-G: LLaVA's conversations, where an answer names its mask's file: "... <SEG> <mask>masks/x.png</mask>".

    Files are relative to the JSON's folder; a name tells modality, data set and case ("mr_t1--BraTS2020--1--x_8.png").
    All sequences of MR are one modality, as in the paper's macro mean over eight.
    """
    for number, (place, record) in enumerate(_records(file)):
        image = as_text(required(record, place, "image"), place, "image")
        turns = [str(turn.get("value", "")) for turn in required(record, place, "conversations")]
        masks = re.findall(r"<mask>(.*?)</mask>", " ".join(turns[1:]))
        if not masks:
            raise ValueError(f"{place}: expected a question and an answer with <mask>FILE</mask>, got {turns}")
        # <region> ... </region> marks what is asked for; nothing of it is for the model to read.
        question = re.sub(r"<image>|</?region>|<SEG>", "", turns[0]).strip()
        parts = Path(image).name.split("--")
        kind = re.sub(r"_\d+$", "", parts[0]) if len(parts) > 1 else "-"
        yield Case(
            id=f"{record.get('id', number)}:{image}",
            prompt=words.prompt(image, {"question": question}),
            images=_pictures(file.parent, [image]),
            masks=_pictures(file.parent, masks),
            dataset=parts[1] if len(parts) > 1 else "-",
            patient=parts[2] if len(parts) > 3 else image,
            modality="mr" if kind.startswith("mr_") else kind,
        )


def _diagseg_cases(benchmark: Benchmark, file: Path, words: Words) -> Iterator[Case]:
    """A JSON record a case, by the names of the declaration's `fields`; files are relative to the JSON's folder."""
    for place, record in _records(file):
        fields = _named_fields(benchmark, record, place)
        identity, question, answer, image = (
            as_text(fields[name], place, name) for name in ("id", "question", "answer", "image")
        )
        masks = [fields["masks"]] if isinstance(fields["masks"], str) else fields["masks"] or []
        if not isinstance(masks, list) or not all(isinstance(mask, str) for mask in masks):
            raise ValueError(f"{place}: expected the path of a mask or a list of paths, got {fields['masks']!r}")
        yield Case(
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


def _named_fields(benchmark: Benchmark, record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A record's values by our names; None for those of `OPTIONAL_FIELDS` that it has not."""
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
        raise ValueError(
            f"{place}: benchmark {benchmark.name} expects {', '.join(missing)}, and the record has "
            f"{', '.join(map(repr, record))}; say what they are called in a YAML file for --benchmark: "
            f"'{benchmark.name}: {{like: diagseg, fields: {{NAME: FIELD}}}}'"
        )
    return values


FILE_READERS: dict[str, Callable[[Benchmark, Path, Words], Iterator[Case]]] = {
    "annotated": _annotated_cases,
    "diagseg": _diagseg_cases,
    "mecovqa": _mecovqa_cases,
    "mmmu": _mmmu_cases,
}
