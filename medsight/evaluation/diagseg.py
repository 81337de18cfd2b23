"""Makes a benchmark of diagnoses and the masks that show them: `medsight benchmark build-diagseg`."""

import csv
import filecmp
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medsight.data.records import as_text, json_records
from medsight.data.sources import Source, iterate
from medsight.files import check_empty, staged_folder, write_json, write_text

from .cases import relative
from .region_cases import Diagnosis, diagnosis_of


QUESTION = "What is the diagnosis? Segment the finding."


def read_table(path: Path) -> dict[str, str]:
    """Diagnoses by image from a CSV file (columns image, diagnosis) or JSON lines of the same fields."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: list[Any] = list(csv.DictReader(file))
    else:
        rows = [record for _, record in json_records(path)]
    table: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        if isinstance(row, ValueError):
            raise row
        place = f"{path}, row {number}"
        image, diagnosis = (as_text(row.get(name), place, name).strip() for name in ("image", "diagnosis"))
        if image in table:
            raise ValueError(f"{place}: {image} has a diagnosis already")
        table[image] = diagnosis
    if not table:
        raise ValueError(f"{path}: expected rows of image and diagnosis, found none")
    return table


def build(data: Path, output: Path, table: Path | None = None, question: str = QUESTION) -> dict[str, int]:
    """Write diagnose-then-segment items from the test rows of a set in BiomedParse's layout.

    The new or empty folder gets, whole or not at all, diagseg.json (qa_id, question, short_answer, image_file,
    mask_files, target, modality, site, dataset, patient), copies of the images and masks that it names, and README.md,
    which says how it was made.

    Args:
        data: the set, or a folder of sets.
        table: diagnoses by image (path below `data`, or file name); by default what the data itself says.

    Returns:
        How many rows became items, and how many did not, by reason.

    Raises:
        OSError: files are missing, the output folder is not empty, or two files would have one name in it.
        ValueError: a row is bad, the table names an image that is not there, or no row has a diagnosis.
    """
    diagnoses = None if table is None else read_table(table)
    rows = [entry.checked() for entry in iterate(Source("biomedparse", str(data), split=None))]
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
        write_json(folder / "diagseg.json", records)
        write_text(folder / "README.md", _card(records, counts, data, table))
    return {**counts, "items": len(chosen)}


def _look_up(
    diagnoses: Mapping[str, str], rows: Sequence[Mapping[str, Any]], data: Path, table: Path | None
) -> list[str | None]:
    """What the table says of each row, by its image's path below the data or by its file name."""
    images = [relative(row["image"]["path"], data) for row in rows]
    keys = [next((name for name in (image, Path(image).name) if name in diagnoses), None) for image in images]
    unknown = sorted(set(diagnoses).difference(keys))
    if unknown:
        raise ValueError(f"{table}: {len(unknown)} image(s) are no test images of {data}, first: {unknown[0]}")
    return [None if key is None else diagnoses[key] for key in keys]


def _copied(row: Mapping[str, Any], diagnosis: Diagnosis, question: str, data: Path, folder: Path) -> dict[str, Any]:
    """The record of an item, whose image and masks are copied into the folder."""
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
    found = "the data's own `finding`; where there is none, structures that are abnormal by their names."
    if table is not None:
        found = f"from the table `{table.name}`."
    return f"""# Diagnose, then segment

{len(records)} items from the test rows of `{data.name}`: a question, a short answer, and the masks that
show it. Question: "{records[0]["question"]}"

How a diagnosis was found: {found}
Its masks: of the structures that name it, else of abnormal ones, else of the only one. A normal finding has
none, and giving a mask there is wrong.

Patients: only those all of whose images are test rows.

{_table("left out", "rows", left_out)}
{_table("modality", "items", Counter(record["modality"] for record in records))}
{_table("short answer", "items", Counter(record["short_answer"] for record in records))}
Licences are those of the images' own sets. Score it with `medsight evaluate --benchmark diagseg --data THIS_FOLDER`.
"""


def _table(what: str, counted: str, counts: Mapping[str, int]) -> str:
    rows = [f"| {name} | {count} |\n" for name, count in sorted(counts.items())]
    return f"| {what} | {counted} |\n|---|---|\n{''.join(rows)}"
