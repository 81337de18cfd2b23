"""`medsight benchmark build-diagseg`, and the diagnoses that it finds."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medsight import cli
from medsight.evaluation.benchmarks import load_benchmark
from medsight.evaluation.readers import read_cases
from medsight.evaluation.region_cases import Diagnosis, diagnosis_of


Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("targets", "finding", "expected"),
    [
        (["liver", "liver tumor"], None, Diagnosis("liver tumor", ("liver tumor",), (1,))),
        (["liver", "cyst", "cyst"], "tumor", Diagnosis("tumor", ("cyst",), (1, 2))),
        (["benign breast tumor"], "benign", Diagnosis("benign breast tumor", ("benign breast tumor",), (0,))),
        (["skin lesion"], "melanoma", Diagnosis("melanoma", ("skin lesion",), (0,))),
        (["liver", "spleen"], "hepatitis", Diagnosis("hepatitis", (), ())),
        (["liver"], "Normal", Diagnosis("Normal", (), ())),
        ([], "colitis", Diagnosis("colitis", (), ())),
        (["liver", "spleen"], None, None),
    ],
)  # fmt: skip
def test_a_diagnosis_and_the_masks_that_show_it(targets: list[str], finding: str | None, expected: Any) -> None:
    assert diagnosis_of({"targets": targets, "absent": [], "finding": finding}) == expected


def build(data: Path, output: Path, *options: str) -> int:
    return cli.main(["benchmark", "build-diagseg", str(data), "--output", str(output), *options])


def test_items_are_self_contained_and_can_be_evaluated(
    regions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = shutil.copytree(regions, tmp_path / "data")
    assert build(copied, tmp_path / "out", "--question", "Diagnosis?") == 0
    shutil.rmtree(copied)
    cases, _ = read_cases(load_benchmark("diagseg"), tmp_path / "out")
    assert [(case.answer, len(case.masks), case.absent) for case in cases] == [
        *[("malignant breast tumor", 1, False)] * 3,
        ("normal", 0, True),
    ]
    assert {case.prompt for case in cases} == {"<image>\nDiagnosis?"} and cases[0].patient == "p2"
    assert all(Path(entry["path"]).is_file() for case in cases for entry in (*case.images, *case.masks))
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "4 items" in card and "| no diagnosis | 2 |" in card and "| malignant breast tumor | 3 |" in card
    assert "left out, no diagnosis: 2" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_table_names_the_diagnoses(regions: Path, tmp_path: Path, write_lines: Write, ending: str) -> None:
    table, found = tmp_path / f"table.{ending}", {"set/test/0.png": "liver abscess", "2.png": "carcinoma"}
    if ending == "csv":
        table.write_text("\n".join(["image,diagnosis", *map(",".join, found.items())]))
    else:
        write_lines(table, [{"image": image, "diagnosis": diagnosis} for image, diagnosis in found.items()])
    assert build(regions, tmp_path / "out", "--table", str(table)) == 0
    assert build(regions, tmp_path / "out", "--table", str(table)) == 1  # what is there is not touched
    records = json.loads((tmp_path / "out" / "diagseg.json").read_text())
    assert [(record["qa_id"], record["short_answer"], len(record["mask_files"])) for record in records] == [
        ("set/test/0.png", "liver abscess", 0),
        ("set/test/2.png", "carcinoma", 1),
    ]


def test_a_patient_of_another_split_is_left_out(regions: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(regions, tmp_path / "data")
    manifest = copied / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"group": "p5"', '"group": "p2"'))  # image 5 is a training image
    assert build(copied, tmp_path / "out") == 0
    records = json.loads((tmp_path / "out" / "diagseg.json").read_text())
    assert [record["patient"] for record in records] == ["p3", "p4", "p6"]
    assert "| patient also in another split | 1 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,diagnosis\nx.png,tumor\n", "1 image.s. are no test images of .*first: x.png"),
        ("image,finding\n0.png,tumor\n", "row 1: expected text in 'diagnosis'"),
        ("image,diagnosis\n0.png, \n", "row 1: expected text in 'diagnosis'"),
        ("image,diagnosis\n0.png,a\n0.png,b\n", "row 2: 0.png has a diagnosis already"),
        ("image,diagnosis\n", "expected rows of image and diagnosis, found none"),
    ],
)
def test_a_bad_table_is_refused_and_nothing_written(
    regions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    table = tmp_path / "table.csv"
    table.write_text(content)
    assert build(regions, tmp_path / "out", "--table", str(table)) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("clash", [False, True])
def test_files_outside_the_set_are_copied_into_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], draw_picture: Write, write_lines: Write, clash: bool
) -> None:
    rows = []
    for number, place in enumerate(["b/images/test", "c/images/test"] if clash else ["b/images/test"]):
        draw_picture(tmp_path / place / "a.png", seed=number)
        draw_picture(tmp_path / place / "a_mask.png", mask=True, seed=number)
        common = {"modality": "CT", "site": "torso", "target": "tumor", "split": "test"}
        rows.append({"image": f"../../{place}/a.png", "mask": f"../../{place}/a_mask.png", **common})
    write_lines(tmp_path / "sets" / "set" / "manifest.jsonl", rows)
    before = sorted(tmp_path.rglob("*"))
    status = build(tmp_path / "sets" / "set", tmp_path / "deep" / "er" / "out")
    if clash:
        assert status == 1 and "another file is copied to files/images/test/a.png already" in capsys.readouterr().err
        return
    assert status == 0, capsys.readouterr().err
    output = tmp_path / "deep" / "er" / "out"
    assert [path for path in sorted(tmp_path.rglob("*")) if tmp_path / "deep" not in (path, *path.parents)] == before
    assert {path.relative_to(output).as_posix() for path in output.rglob("*.png")} == {
        "files/images/test/a.png", "files/images/test/a_mask.png",
    }  # fmt: skip
