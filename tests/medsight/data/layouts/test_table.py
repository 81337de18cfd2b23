"""Tables of images and masks: read as their copy in BiomedParse's layout, whatever their columns are called."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsight.data.registry import Source
from medsight.data.sources import detect_layout, iterate
from tests.medsight.data.layouts.picture_sets import (
    NAMES,
    ORIGIN,
    contents,
    errors,
    examples,
    fuzz,
    save,
    write_biomedparse,
)


def records(root: Path) -> list[dict[str, Any]]:
    """A row a mask, an image's rows apart; an image without a structure by a row without a mask."""
    found = []
    for each in examples():
        image = save(root / "pictures" / f"{each.stem}.png", each.pixels).relative_to(root).as_posix()
        common = {"image": image, "patient": each.patient, "split": each.split, **ORIGIN, "spacing_mm": "0.5 0.75"}
        for name, mask in each.masks():
            path = save(root / "drawn" / f"{each.stem}_{name}.png", mask).relative_to(root).as_posix()
            found.append({**common, "mask": path, "target": name, "reader": "A"})
        if not each.labels.any():
            found.append({**common, "mask": "", "target": "", "reader": "B"})
    return found[::2] + found[1::2]


def write(file: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    if file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
        return file
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return file


def source_of(path: Path, **settings: Any) -> Source:
    return Source.from_mapping({"layout": "table", "path": str(path), "split": None, **settings})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t"), ("a.jsonl", "")])
def test_it_is_read_as_its_copy_in_biomedparse(root: Path, tmp_path: Path, name: str, delimiter: str) -> None:
    file = write(root / name, records(root), delimiter)
    expected = contents(write_biomedparse(tmp_path / "biomedparse"))
    assert contents(source_of(root)) == contents(source_of(file)) == expected
    assert contents(source_of(root, split="test")) == {"p3_06": expected["p3_06"]}
    rows = [entry.checked() for entry in iterate(source_of(file))]
    assert {size for row in rows for size in row["spacing_mm"]} == {(0.5, 0.75)}
    assert len(list(iterate(source_of(file, where={"reader": "A"})))) == 5
    assert detect_layout(root) in ("table", "biomedparse")
    assert detect_layout(file) == ("biomedparse" if name.endswith("l") else "table")


def test_columns_have_usual_names_or_those_that_the_source_says(root: Path) -> None:
    expected = contents(source_of(write(root / "a.csv", records(root))))
    called = {"image": "file_name", "mask": "mask_path", "target": "structure", "patient": "patient_id"}
    rows = [{called.get(name, name): value for name, value in row.items()} for row in records(root)]
    assert contents(source_of(write(root / "a.csv", rows))) == expected
    odd = {"image": "Bild", "mask": "Maske", "target": "Was"}
    rows = [{odd.get(name, name): value for name, value in row.items()} for row in records(root)]
    assert contents(source_of(write(root / "a.csv", rows), columns=odd)) == expected
    assert contents(source_of(root, columns=odd)) == expected
    assert "expected a path in the column 'image': say which it is" in errors(source_of(root / "a.csv"))[0]
    assert "there is no column 'Maske1': did you mean 'Maske'" in errors(
        source_of(root / "a.csv", columns={**odd, "mask": "Maske1"})
    )[0]  # fmt: skip
    with pytest.raises(ValueError, match="data columns: 'imge' is unknown: did you mean 'image'"):
        source_of(root, columns={"imge": "x"})


def test_label_maps_are_named_by_the_source(root: Path, tmp_path: Path) -> None:
    rows = []
    for each in examples():
        save(root / f"{each.stem}.png", each.pixels)
        save(root / f"{each.stem}_map.png", each.labels)
        rows.append({"image": f"{each.stem}.png", "mask": f"{each.stem}_map.png", "split": each.split})
    source = source_of(write(root / "a.csv", rows), names=NAMES, patient=r"^(p\d)_", **ORIGIN)
    assert contents(source) == contents(write_biomedparse(tmp_path / "biomedparse"))


def test_a_target_without_a_mask_is_absent(root: Path) -> None:
    save(root / "a.png", np.zeros((4, 4), np.uint8))
    source = source_of(write(root / "a.csv", [{"image": "a.png", "mask": "", "target": "liver", **ORIGIN}]))
    assert [entry.checked()["absent"] for entry in iterate(source)] == [["liver"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": "../x.png"}, "line 2: '../x.png' leads out of"),
        ({"image": "/etc/x.png"}, "line 2.*'/etc/x.png' leads out of"),
        ({"image": ""}, "line 2: expected a path in the column 'image'"),
        ({"patient": "p9"}, "disagree on 'patient': p"),
        ({"spacing_mm": "0.5"}, "line 2: expected two numbers in 'spacing_mm'"),
        ({"spacing_mm": "0.5 -1"}, "line 2: expected sizes in mm"),
        ({"mask": "gone.png"}, "gone.png: no such image file"),
    ],
)
def test_a_bad_row_is_named(root: Path, change: dict[str, str], message: str) -> None:
    rows = records(root)
    rows.sort(key=lambda row: "p3" not in row["image"])
    file = write(root / "a.csv", [{**rows[0], **change}, *rows[1:]])
    with pytest.raises((ValueError, OSError), match=message):
        for entry in iterate(source_of(file)):
            entry.checked()


def test_a_row_of_another_length_is_named(root: Path) -> None:
    file = write(root / "a.csv", records(root))
    file.write_text(file.read_text() + "a.png,b\n")
    assert "a.csv, line 13: expected 9 cells" in errors(source_of(file))[0]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_damaged_file_is_rows_or_named_errors(root: Path, name: str) -> None:
    file = write(root / name, records(root))
    if name == "a.jsonl":
        file = root / "a.json"
        file.write_text(json.dumps(records(root)))
    assert fuzz(lambda: source_of(file.parent if name == "a.csv" else file), [file]) == {"rows", "errors"}
