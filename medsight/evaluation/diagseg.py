"""Diagnoses of images with masks, and diagnose-then-segment items made from them."""

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping
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
    from medsight.training.data.templates import Wordings

    return Wordings.load().findings


def diagnosis_of(row: Mapping[str, Any], finding: str | None = None) -> Diagnosis | None:
    """The diagnosis of a row of `REGION_FEATURES`; None where it has none to ask for.

    With a finding, its masks are those of the structures that name it, else of abnormal ones, else of the only one;
    a normal finding has none. Without a finding, structures that are abnormal by their names are the diagnosis.

    Args:
        finding: from a table of diagnoses, instead of the row's own.
    """
    from medsight.training.data.templates import matches

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
        OSError: files are missing, or the output folder is not empty.
        ValueError: a row is bad, a patient of the test rows is in another split too, the table names an image that is
            not there, or no row has a diagnosis.
    """
    from medsight.evaluation.items import relative
    from medsight.output_folder import staged_folder
    from medsight.training.data.sources import Source, iterate

    diagnoses = None if table is None else read_table(table)
    rows: list[dict[str, Any]] = []
    for entry in iterate(Source("biomedparse", str(data), split=None)):
        if entry.error is not None:
            raise entry.error
        rows.append(entry.row)
    elsewhere = {row["patient"] for row in rows if row["split"] != "test"}
    counts: Counter[str] = Counter()
    chosen: list[tuple[dict[str, Any], Diagnosis]] = []
    used: set[str] = set()
    for row in rows:
        if row["split"] != "test":
            continue
        image, finding = relative(row["image"]["path"], data), None
        if diagnoses is not None:
            key = next((name for name in (image, Path(image).name) if name in diagnoses), None)
            if key is None:
                counts["not in the table"] += 1
                continue
            used.add(key)
            finding = diagnoses[key]
        if row["patient"] in elsewhere:
            counts["patient also in another split"] += 1
            continue
        diagnosis = diagnosis_of(row, finding)
        if diagnosis is None:
            counts["no diagnosis"] += 1
            continue
        chosen.append((row, diagnosis))
    if diagnoses is not None and set(diagnoses) - used:
        unknown = sorted(set(diagnoses) - used)
        raise ValueError(f"{table}: {len(unknown)} image(s) are no test images of {data}, first: {unknown[0]}")
    if not chosen:
        raise ValueError(f"{data}: no test row has a diagnosis; name one for each image with --table FILE")
    counts["items"] = len(chosen)
    with staged_folder(output, False, _check_empty) as folder:
        _write(folder, data, chosen, question, counts, table)
    return dict(counts)


def _check_empty(output: Path, overwrite: bool) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output {output} is not an empty folder; name another one")


def _write(
    folder: Path,
    data: Path,
    chosen: list[tuple[dict[str, Any], Diagnosis]],
    question: str,
    counts: Counter[str],
    table: Path | None,
) -> None:
    import shutil

    from medsight.evaluation.items import relative

    records = []
    for row, diagnosis in chosen:
        files = [row["image"]["path"], *(row["masks"][index]["path"] for index in diagnosis.masks)]
        copies = []
        for file in files:
            copy = folder / "files" / relative(file, data)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            copies.append(copy.relative_to(folder).as_posix())
        records.append(
            {
                "qa_id": relative(row["image"]["path"], data),
                "question": question,
                "short_answer": diagnosis.answer,
                "image_file": copies[0],
                "mask_files": copies[1:],
                "target": " and ".join(diagnosis.targets) or None,
                **{name: row[name] for name in ("dataset", "modality", "site", "patient", "label_origin")},
            }
        )
    (folder / ITEMS).write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    by_modality = Counter(row["modality"] for row, _ in chosen)
    by_answer = Counter(diagnosis.answer for _, diagnosis in chosen)
    lines = [
        "# Diagnose, then segment",
        "",
        f"{len(chosen)} items from the test rows of `{data.name}`: a question, a short answer, and the masks that",
        f'show it. Question: "{question}"',
        "",
        "How a diagnosis was found: "
        + (
            f"from the table `{table.name}`."
            if table is not None
            else "the data's own `finding`; where there is none, structures that are abnormal by their names."
        ),
        "Its masks: of the structures that name it, else of abnormal ones, else of the only one. A normal finding has",
        "none, and giving a mask there is wrong.",
        "",
        "Patients: only those all of whose images are test rows.",
        "",
        "| left out | rows |",
        "|---|---|",
        *(f"| {reason} | {count} |" for reason, count in sorted(counts.items()) if reason != "items"),
        "",
        "| modality | items |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in sorted(by_modality.items())),
        "",
        "| short answer | items |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in sorted(by_answer.items())),
        "",
        "Licences are those of the images' own sets. Score it with "
        "`medsight evaluate --benchmark diagseg --data THIS_FOLDER`.",
    ]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")
