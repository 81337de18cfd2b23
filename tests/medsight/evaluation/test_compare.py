"""`medsight compare`: paired differences over the same rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medsight import cli
from medsight.evaluation.compare import compare


Write = Callable[..., Path]


@pytest.fixture
def evaluation(tmp_path: Path) -> Write:
    """What `medsight evaluate` writes, as far as a comparison reads it."""

    def write(
        name: str, dices: list[float | None], patient: Callable[[int], str | None] = lambda i: None, **changed: Any
    ) -> Path:
        folder = tmp_path / name
        rows = [
            {
                "id": str(i), "modality": "CT" if i < 30 else "MRI", "dataset": "d", "target": "t",
                "patient": patient(i), "answer": "separators of lines: one\u2028two\x85three",
                "answer_type": None, "absent": dice is None, "no_region": dice is None, "dice": dice, "iou": None,
            }
            for i, dice in enumerate(dices)
        ]  # fmt: skip
        folder.mkdir(exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "scores.jsonl").write_text("".join(lines), encoding="utf-8")
        metrics = {
            "system": name, "benchmark": "segmentation", "title": "T", "task": "segment",
            "protocol": {"masks": "medsight"}, "run": {"data": {"sha256": "x"}},
        }  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(metrics | changed))
        return folder

    return write


def test_differences_are_paired_and_an_improvement_is_above_zero(evaluation: Write) -> None:
    first = evaluation("a", [0.4 + 0.01 * (i % 10) for i in range(40)] + [None])
    second = evaluation("b", [0.5 + 0.01 * (i % 10) for i in range(40)] + [None])
    result = compare(first, second)
    dice = result["scores"]["dice"]
    # The rows vary by themselves, their difference does not.
    assert (dice["difference"], dice["low"], dice["high"]) == (0.1, pytest.approx(0.1), pytest.approx(0.1))
    assert (dice["a"], dice["b"], dice["n"], dice["better"], dice["worse"]) == (0.445, 0.545, 40, 40, 0)
    assert result["scores"]["negatives_right"]["n"] == 1
    assert set(result["by"]["modality"]) == {"CT", "MRI"} and result["by"]["modality"]["CT"]["dice"]["n"] == 30


def test_a_missing_folder_of_the_output_is_named(
    evaluation: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair, output = [str(evaluation(name, [0.5] * 4)) for name in "ab"], tmp_path / "nodir" / "x.json"
    assert cli.main(["compare", *pair, "--output", str(output)]) == 1
    assert f"{output}: there is no folder {output.parent};" in capsys.readouterr().err


def test_pairs_of_a_patient_are_drawn_together(evaluation: Write) -> None:
    dices: list[float | None] = [0.5 + 0.04 * (i // 4) for i in range(40)]  # four rows of ten patients alike
    others: list[float | None] = [0.5] * 40
    alone = compare(evaluation("a", dices), evaluation("b", others))
    together = compare(*(evaluation(n, some, lambda i: f"p{i // 4}") for n, some in (("c", dices), ("d", others))))
    assert (alone["interval_unit"], together["interval_unit"]) == ("row", "patient or image")
    row, patient = alone["scores"]["dice"], together["scores"]["dice"]
    assert (row["difference"], row["units"], patient["units"]) == (patient["difference"], 40, 10)
    assert patient["high"] - patient["low"] > 1.5 * (row["high"] - row["low"])
    assert together["by"]["modality"]["MRI"]["dice"]["units"] == 3


def test_a_distance_is_better_where_it_is_smaller(evaluation: Write) -> None:
    folders = [evaluation(name, [0.5] * 4) for name in "ab"]
    for folder, distance in zip(folders, (9.0, 2.0), strict=True):
        rows = [json.loads(line) | {"hd95_mm": distance} for line in (folder / "scores.jsonl").open(encoding="utf-8")]
        (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = compare(*folders)["scores"]["hd95_mm"]
    assert (found["difference"], found["better"], found["worse"]) == (-7.0, 4, 0)


def test_macro_weighs_modalities_alike(evaluation: Write) -> None:
    first, second = evaluation("a", [0.5] * 30 + [0.5] * 10), evaluation("b", [0.6] * 30 + [0.2] * 10)
    result = compare(first, second)
    assert result["scores"]["dice"]["difference"] == pytest.approx((30 * 0.1 - 10 * 0.3) / 40)
    assert result["macro"]["dice"]["difference"] == pytest.approx((0.1 - 0.3) / 2)


def test_the_terminal_marks_what_leaves_out_zero(
    evaluation: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first, second = evaluation("a", [0.5] * 40), evaluation("b", [0.6 + i % 2 / 10 for i in range(40)])
    output = tmp_path / "out.json"
    assert cli.main(["compare", str(first), str(second), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("Dice, micro"))
    assert line.split()[2:5] == ["50.0", "65.0", "+15.0"] and " * " in line and " B - A " in printed
    assert json.loads(output.read_text()) == compare(first, second)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"benchmark": "vqa-rad"}, "different benchmarks: segmentation and vqa-rad"),
        ({"protocol": {"masks": "citrus"}}, "different protocols"),
        ({"run": {"data": {"sha256": "y"}}}, "different data or prompts"),
    ],
)
def test_evaluations_that_cannot_be_paired_are_refused(
    evaluation: Write, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(evaluation("a", [0.5] * 4), evaluation("b", [0.5] * 4, **changed))


def test_other_rows_and_other_folders_are_refused(evaluation: Write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not have the same rows"):
        compare(evaluation("a", [0.5] * 4), evaluation("b", [0.5] * 5))
    with pytest.raises(FileNotFoundError, match="is no evaluation: it has no metrics.json"):
        compare(tmp_path, tmp_path / "a")
