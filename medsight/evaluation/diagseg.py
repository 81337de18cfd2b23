"""Diagnoses of images with masks, and diagnose-then-segment items made from them."""

import csv
import filecmp
import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


QUESTION = "What is the diagnosis? Segment the finding."
CARD = "README.md"
ITEMS = "diagseg.json"
TABLE_FIELDS = ("image", "diagnosis")


@dataclass(frozen=True)
class Diagnosis:
    """What an image's row says of its diagnosis.

    Attributes:
        answer: the short answer.
        targets: the structures that show it.
        masks: their masks, as indices into the row's.
    """

    answer: str
    targets: tuple[str, ...]
    masks: tuple[int, ...]


@cache
def _findings() -> dict[str, list[str]]:
    from medsight.data.templates import Wordings

    return Wordings.load().findings


def diagnosis_of(row: Mapping[str, Any], finding: str | None = None) -> Diagnosis | None:
    """The diagnosis of a row of `REGION_FEATURES`; None where it has none to ask for.

    With a finding, its masks are those of the structures that name it, else of abnormal ones, else of the only one;
    a normal finding has none. Without a finding, structures that are abnormal by their names are the diagnosis.

    Args:
        finding: from a table of diagnoses, instead of the row's own.
    """
    from medsight.data.templates import matches

    finding = finding or row.get("finding")
    targets = list(dict.fromkeys(row["targets"]))
    abnormal = [target for target in targets if matches(target, _findings()["abnormal"])]
    if finding and matches(finding, _findings()["normal"]):
        return Diagnosis(finding, (), ())
    if finding:
        named = [target for target in targets if re.search(rf"(?<!\w){re.escape(finding)}(?!\w)", target, re.I)]
        signs = named or abnormal or (targets if len(targets) == 1 else [])
        answer = signs[0] if named and len(signs) == 1 else finding
    else:
        signs = abnormal
        answer = " and ".join(abnormal)
    if not answer:
        return None
    masks = tuple(index for index, target in enumerate(row["targets"]) if target in signs)
    return Diagnosis(answer, tuple(signs), masks)


def read_table(path: Path) -> dict[str, str]:
    """Diagnoses by image from a CSV file (columns image, diagnosis) or JSON lines of the same fields.

    Raises:
        OSError: the file cannot be read.
        ValueError: a column is missing, a field is empty, or an image has two diagnoses.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows: list[Any]
        if path.suffix == ".csv":
            rows = list(csv.DictReader(file))
        else:
            try:
                rows = [json.loads(line) for line in file if line.strip()]
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: expected a CSV file, or a JSON object a line ({error})") from error
    table: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        for name in TABLE_FIELDS:
            if not isinstance(row, dict) or not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(f"{path}, row {number}: expected text in {name!r}, got {row}")
        image = row["image"].strip()
        if image in table:
            raise ValueError(f"{path}, row {number}: {image} has a diagnosis already")
        table[image] = row["diagnosis"].strip()
    if not table:
        raise ValueError(f"{path}: expected rows of image and diagnosis, found none")
    return table


def build(data: Path, output: Path, table: Path | None = None, question: str = QUESTION) -> dict[str, int]:
    """Write diagnose-then-segment items from the test rows of a set in BiomedParse's layout.

    The folder gets diagseg.json (qa_id, question, short_answer, image_file, mask_files, target, modality, site,
    dataset, patient), copies of the images and masks that it names, and README.md, which says how it was made.

    Args:
        data: the set, or a folder of sets.
        output: new or empty folder; appears whole or not at all.
        table: diagnoses by image (path below `data`, or file name); by default what the data itself says.
        question: asked of every item.

    Returns:
        How many rows became items, and how many did not, by reason.

    Raises:
        OSError: files are missing, or the output folder is not empty; or two files from outside the set would have one
            name in it.
        ValueError: a row is bad, a patient of the test rows is in another split too, the table names an image that is
            not there, or no row has a diagnosis.
    """
    from medsight.data.sources import Source, iterate
    from medsight.files import check_empty, staged_folder

    diagnoses = None if table is None else read_table(table)
    rows: list[dict[str, Any]] = []
    for entry in iterate(Source("biomedparse", str(data), split=None)):
        if entry.error is not None:
            raise entry.error
        rows.append(entry.row)
    tests = [row for row in rows if row["split"] == "test"]
    findings = [None] * len(tests) if diagnoses is None else _look_up(diagnoses, tests, data, table)
    elsewhere = {row["patient"] for row in rows if row["split"] != "test"}
    counts: Counter[str] = Counter()
    chosen: list[tuple[dict[str, Any], Diagnosis]] = []
    for row, finding in zip(tests, findings, strict=True):
        if table is not None and finding is None:
            counts["not in the table"] += 1
        elif row["patient"] in elsewhere:
            counts["patient also in another split"] += 1
        elif (diagnosis := diagnosis_of(row, finding)) is None:
            counts["no diagnosis"] += 1
        else:
            chosen.append((row, diagnosis))
    if not chosen:
        raise ValueError(f"{data}: no test row has a diagnosis; name one for each image with --table FILE")
    with staged_folder(output, False, check_empty) as folder:
        records = [_copied(row, diagnosis, question, data, folder) for row, diagnosis in chosen]
        (folder / ITEMS).write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / CARD).write_text(_card(records, counts, data, table), encoding="utf-8")
    return {**counts, "items": len(chosen)}


def _look_up(
    diagnoses: Mapping[str, str], rows: Sequence[Mapping[str, Any]], data: Path, table: Path | None
) -> list[str | None]:
    """What the table says of each row, by its image's path below the data or by its file name."""
    from medsight.evaluation.items import relative

    images = [relative(row["image"]["path"], data) for row in rows]
    keys = [next((name for name in (image, Path(image).name) if name in diagnoses), None) for image in images]
    unknown = sorted(set(diagnoses).difference(keys))
    if unknown:
        raise ValueError(f"{table}: {len(unknown)} image(s) are no test images of {data}, first: {unknown[0]}")
    return [None if key is None else diagnoses[key] for key in keys]


def _copied(row: Mapping[str, Any], diagnosis: Diagnosis, question: str, data: Path, folder: Path) -> dict[str, Any]:
    """The record of an item, whose image and masks are copied into the folder."""
    from medsight.evaluation.items import relative

    copies = []
    for file in [row["image"]["path"], *(row["masks"][index]["path"] for index in diagnosis.masks)]:
        copy = folder / "files" / relative(file, data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if copy.exists() and not filecmp.cmp(file, copy, shallow=False):
            raise FileExistsError(f"{file}: another file is copied to {copy.relative_to(folder)} already; rename one")
        shutil.copyfile(file, copy)
        copies.append(copy.relative_to(folder).as_posix())
    return {
        "qa_id": relative(row["image"]["path"], data),
        "question": question,
        "short_answer": diagnosis.answer,
        "image_file": copies[0],
        "mask_files": copies[1:],
        "target": " and ".join(diagnosis.targets) or None,
        **{name: row[name] for name in ("dataset", "modality", "site", "patient", "label_origin")},
    }


def _card(records: Sequence[Mapping[str, Any]], left_out: Mapping[str, int], data: Path, table: Path | None) -> str:
    """README.md: how the items were made, and how many of each kind there are."""
    found = (
        "the data's own `finding`; where there is none, structures that are abnormal by their names."
        if table is None
        else f"from the table `{table.name}`."
    )
    lines = [
        "# Diagnose, then segment",
        "",
        f"{len(records)} items from the test rows of `{data.name}`: a question, a short answer, and the masks that",
        f'show it. Question: "{records[0]["question"]}"',
        "",
        f"How a diagnosis was found: {found}",
        "Its masks: of the structures that name it, else of abnormal ones, else of the only one. A normal finding has",
        "none, and giving a mask there is wrong.",
        "",
        "Patients: only those all of whose images are test rows.",
        "",
        *_table("left out", "rows", left_out),
        *_table("modality", "items", Counter(record["modality"] for record in records)),
        *_table("short answer", "items", Counter(record["short_answer"] for record in records)),
        "Licences are those of the images' own sets. Score it with "
        "`medsight evaluate --benchmark diagseg --data THIS_FOLDER`.",
    ]
    return "\n".join(lines) + "\n"


def _table(what: str, counted: str, counts: Mapping[str, int]) -> list[str]:
    rows = [f"| {name} | {count} |" for name, count in sorted(counts.items())]
    return [f"| {what} | {counted} |", "|---|---|", *rows, ""]
