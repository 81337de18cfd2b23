"""`medsight evaluate` from the command line: what is written, what is refused, figures that others can recompute."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medsight.evaluation.predictions import encode_mask


Write = Callable[..., Path]
Evaluate = Callable[..., tuple[int, str]]
Score = Callable[..., dict[str, Any]]


def metrics_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text("utf-8"))


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "scores.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def segmentation(declare: Write) -> Path:
    return declare("segmentation", expected_rows=9)


@pytest.fixture
def saved(regions: Path, tmp_path: Path, write_lines: Write) -> Write:
    """Saved predictions that give each present structure its own reference mask, changed as asked."""
    manifest = [json.loads(line) for line in (regions / "manifest.jsonl").read_text().splitlines()]

    def write(change: Callable[[list[dict[str, Any]]], Any] = lambda records: None) -> Path:
        records = []
        for row in (row for row in manifest if row["split"] == "test"):
            masks = []
            if row["mask"]:
                masks = [encode_mask(np.asarray(Image.open(regions / row["mask"]), dtype=bool))]
            records.append({"id": f"{row['image']}#{row['target']}", "answer": f"{row['target']}.", "masks": masks})
        change(records)
        return write_lines(tmp_path / "saved" / "mine.jsonl", records)

    return write


@pytest.fixture
def score(evaluate: Evaluate, segmentation: Path, regions: Path, tmp_path: Path) -> Score:
    """Scores saved predictions, or the tiny model's, into a folder of the test, and returns metrics.json and what was
    printed; or sees that it is refused, with this message."""

    def run(
        saved: Path | None,
        *options: str,
        benchmark: Path | str = segmentation,
        data: Path = regions,
        output: str = "out",
        refused: str | None = None,
    ) -> dict[str, Any]:
        answers = () if saved is None else ("--predictions", str(saved))
        status, printed = evaluate(benchmark, data, tmp_path / output, *answers, *options)
        assert (status > 0) == (refused is not None) and (refused or "") in printed, printed
        return {**(metrics_of(tmp_path / output) if status == 0 else {}), "printed": printed}

    return run


def test_a_model_s_run_and_its_saved_predictions_give_the_same_figures(score: Score, tmp_path: Path) -> None:
    first = score(None, output="a")
    second = score(tmp_path / "a" / "predictions.jsonl", output="b")
    assert "protocol medsight (threshold 0.5" in first["printed"]
    assert first["run"].keys() >= {"checkpoint", "data", "dtype", "threshold", "codes_per_group"}
    assert second["run"].pop("predictions_sha256")
    assert {**first, "printed": ""} == {**second, "printed": ""}
    written = {path.name for path in (tmp_path / "a").iterdir()} - {".lock"}
    assert written == {"predictions.jsonl", "scores.jsonl", "metrics.json", "report.html", "run.json"}


def test_cited_codes_are_held_against_those_of_the_model_s_own_codebook(
    score: Score, named_checkpoint: Path, tmp_path: Path
) -> None:
    assert score(None, "--model", str(named_checkpoint), output="a")["predicted_groups"]["by"] == "classifier"
    path = tmp_path / "a" / "predictions.jsonl"
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [len(record["reference_codes"]) for record in records] == [1, 1, 1, 1, 1, 1, 1, 0, 0]
    known = {"CT torso", "ultrasound breast", *(f"group {index}" for index in range(2, 40))}
    assert {record["group"] for record in records} <= known
    # The answers of an untrained model cite nothing; let three cite their own codes, or another of the same group.
    for record in records:
        record.update(masks=[], codes=[], groups=[], scores=[], phrases=[])
    for record in records[:3]:
        record.update(masks=[encode_mask(np.ones((16, 20), dtype=bool))], codes=record["reference_codes"])
    group, index = records[2]["codes"][0].strip("[C]").split("_")
    records[2]["codes"] = [f"[C{group}_{1 - min(int(index), 1)}]"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    metrics = score(path, output="b")
    assert metrics["scores"]["code_accuracy"]["micro"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert metrics["scores"]["group_accuracy"]["micro"]["value"] == 1.0
    assert metrics["by"]["modality"]["CT"]["code_accuracy"]["n"] == 3
    found = {"from": {"codebook": 7}, "unknown": 0, "unknown_by_origin": {}, "group_unknown": 0}
    assert metrics["reference_codes"] == found
    assert "the model&#39;s codebook for 7 rows" in (tmp_path / "b" / "report.html").read_text("utf-8")


def test_figures_of_held_out_wordings_say_so(score: Score, saved: Write) -> None:
    title = score(saved())["title"]
    assert score(saved(), "--held-out-prompts", "--overwrite")["title"] == f"{title}, in wordings not trained on"


@pytest.fixture(scope="module")
def answered(
    segmentation: Path, regions: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The predictions of a run, with its run.json beside them."""
    from medsight import cli

    output = tmp_path_factory.mktemp("answered") / "run"
    arguments = ["--benchmark", segmentation, "--data", regions, "--output", output, "--model", tiny_checkpoint]
    assert cli.main(["evaluate", *map(str, arguments), "--device", "cpu", "--max-new-tokens", "4"]) == 0
    return output / "predictions.jsonl"


@pytest.mark.parametrize("name", ["segmentation", "presence"])
def test_answers_to_other_questions_are_no_answers_to_these(
    score: Score, declare: Write, answered: Path, tmp_path: Path, name: str
) -> None:
    benchmark = declare(name, expected_rows=9)
    options = ["--held-out-prompts"] if name == "segmentation" else []
    refusal = "run.json is of the benchmark segmentation with data and wordings"
    printed = score(answered, *options, benchmark=benchmark, refused=refusal)["printed"]
    assert f"asked for is {name} with" in printed and "--held-out-prompts" in printed
    assert not (tmp_path / "out").exists()
    notes = score(answered, *options, "--accept-problems", benchmark=benchmark)["notes"]
    assert any(note.startswith("The answers were given to other questions: its run.json") for note in notes)


def test_the_first_rows_of_saved_predictions_are_scored(score: Score, answered: Path, tmp_path: Path) -> None:
    first = ["set/test/0.png#liver", "set/test/0.png#spleen", "set/test/1.png#liver"]
    for limit in (3, 2):  # of a whole run, then of one that was limited itself
        metrics = score(answered, "--limit", str(limit), output=str(limit))
        assert metrics["n"] == metrics["run"]["data"]["rows"] == limit and not metrics["problems"].get("extra")
        assert f"first {limit} of 9 rows" in metrics["printed"]
        assert [row["id"] for row in rows_of(tmp_path / str(limit))] == first[:limit]
        answered = Path(shutil.copy(answered, tmp_path / str(limit)))
        (answered.parent / "run.json").write_text(json.dumps(metrics["run"]))
    score(answered, "--limit", "2", "--held-out-prompts", output="other", refused="with data and wordings")


def test_a_model_without_a_group_of_that_name_has_no_right_codes_and_says_so(
    score: Score, saved: Write, tmp_path: Path
) -> None:
    def cite(records: list[dict[str, Any]]) -> None:
        for record in records:
            record.update(group="knee", codes=["[C0_0]"] * len(record["masks"]))

    metrics = score(saved(cite))
    assert "code_accuracy" not in metrics["scores"] and metrics["codes"]["answers"]["code_accuracy"] is None
    assert metrics["reference_codes"]["unknown_by_origin"] == {"CT torso": 4, "ultrasound breast": 3}
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "The right codes of 7 rows are not known: no code group of the model is called like" in page


def test_reference_codes_are_one_a_mask(score: Score, saved: Write) -> None:
    path = saved(lambda records: records[0].update(reference_codes=["[C0_1]", "[C0_2]"]))
    score(path, refused="#liver: 2 reference codes for 1 reference masks")


def test_the_right_masks_score_full_marks(score: Score, saved: Write) -> None:
    metrics = score(saved())
    found = {name: both["macro"]["value"] for name, both in metrics["scores"].items()}
    assert found == {"dice": 1.0, "iou": 1.0, "hd95_mm": 0.0, "surface_dice": 1.0}
    assert metrics["scores"]["hd95_mm"]["micro"]["n"] == 4  # the CT rows, whose spacing is known
    assert metrics["negatives"]["no_region_rate"]["value"] == 1.0 and metrics["negatives"]["n"] == 2
    assert metrics["by"]["modality"]["CT"]["dice"]["n"] == 4
    assert metrics["run"]["model"] == "mine"
    assert metrics["interval_unit"] == "patient or image"
    assert metrics["scores"]["dice"]["micro"]["units"] == 5 and metrics["scores"]["dice"]["micro"]["n"] == 7


TWO, THREE = ["liver", "spleen"], ["kidney", "spleen", "kidney"]


@pytest.mark.parametrize(
    ("targets", "answered", "dice"),
    [
        (TWO, [("spleen", [1]), ("Liver", [0])], 1.0),  # in any order and case
        (TWO, [("liver", [0])], 0.5),  # one is missing
        (TWO, [("liver", [0]), ("spleen", [1]), ("spleen", [1])], 2 / 3),  # one is too many
        (TWO, [("liver", [0]), (None, [1])], 1 / 3),  # one is not named: missing, and one too many
        (THREE, [("kidney", [2]), ("spleen", [1]), ("kidney", [0])], 1.0),  # masks of a structure are compared as one
        (THREE, [("kidney", [0, 2]), ("spleen", [1])], 1.0),
        (THREE, [("kidney", [0]), ("kidney", [2])], 0.5),  # without the spleen
        (THREE, [("spleen", [1]), ("kidney", [2])], (2 / 3 + 1) / 2),  # without one of the kidneys, of one size
    ],
)
def test_masks_of_several_structures_are_told_apart_by_name(
    score: Score, tmp_path: Path, write_lines: Write, draw_picture: Write, targets: list, answered: list, dice: float
) -> None:
    data, masks, rows = tmp_path / "data", [], []
    draw_picture(data / "set/test/a.png")
    for number, target in enumerate(targets):
        mask = np.zeros((16, 20), dtype=bool)
        mask[5 * number : 5 * number + 4, 3:9] = True
        masks.append(mask)
        Image.fromarray(mask).save(data / f"set/test/{number}_mask.png")
        place = {"image": "set/test/a.png", "mask": f"set/test/{number}_mask.png", "split": "test"}
        rows.append({**place, "modality": "CT", "site": "torso", "target": target})
    write_lines(data / "manifest.jsonl", rows)
    shown = [encode_mask(np.logical_or.reduce([masks[index] for index in parts])) for _, parts in answered]
    answer = {"id": "set/test/a.png", "answer": "", "masks": shown, "phrases": [name for name, _ in answered]}
    metrics = score(write_lines(tmp_path / "saved.jsonl", [answer]), benchmark="all-structures", data=data)
    assert rows_of(tmp_path / "out")[0]["dice"] == pytest.approx(dice)
    assert "multi order" in metrics["printed"]


@pytest.mark.parametrize("named", [True, False])
def test_codes_of_several_structures_stand_each_for_its_own(
    score: Score, tmp_path: Path, write_lines: Write, named: bool
) -> None:
    empty = encode_mask(np.zeros((16, 20), dtype=bool))
    own = {"codes": ["[C0_0]", "[C0_1]"], "phrases": ["spleen", "Liver"] if named else [], "masks": [empty] * 2}
    records = [{"id": f"set/test/{number}.png", "answer": "", **own} for number in range(2)]
    usage = score(write_lines(tmp_path / "saved.jsonl", records), benchmark="several-structures")["codes"]["usage"]
    if not named:
        assert usage["citations"] == 0  # whose each code is is not known
        return
    group = usage["groups"]["0"]
    assert (group["purity"], group["nmi"], group["citations"]) == (1.0, 1.0, 4)
    stands_for = {code: found["structures"] for code, found in group["codes"].items()}
    assert stands_for == {"[C0_0]": {"spleen": 1.0}, "[C0_1]": {"liver": 1.0}}


@pytest.mark.parametrize("name", ["several-structures", "all-structures", "presence", "position", "modality"])
def test_a_model_is_asked_in_every_way_that_the_data_can_answer(score: Score, tmp_path: Path, name: str) -> None:
    metrics = score(None, "--held-out-prompts", benchmark=name)
    assert metrics["n"] == len(rows_of(tmp_path / "out")) > 0
    assert ("dice" if name.endswith("structures") else "answer") in metrics["scores"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda records: records.pop(3), "1 missing (set/test/1.png#spleen)"),
        (lambda records: records.append({"id": "x", "answer": ""}), "1 extra (x (line 10))"),
        (lambda records: records.append(records[0]), "1 duplicate (set/test/0.png#liver (line 10))"),
        (
            lambda records: records[2].update(masks=[encode_mask(np.ones((4, 4), dtype=bool))]),
            "1 masks (set/test/1.png#liver: mask 1: the mask is 4 x 4 pixels (height x width), its image 16 x 20)",
        ),
    ],
)
def test_predictions_that_do_not_fit_are_refused_unless_accepted(
    score: Score, saved: Write, tmp_path: Path, change: Callable[[list[dict[str, Any]]], Any], problem: str
) -> None:
    path = saved(change)
    assert "--accept-problems" in score(path, refused=problem)["printed"]
    assert not (tmp_path / "out" / "metrics.json").exists()
    metrics = score(path, "--accept-problems")
    kind = problem.split()[1]
    assert metrics["problems"][kind]["count"] == 1 and metrics["n"] == 9
    dices = [row["dice"] for row in rows_of(tmp_path / "out") if not row["absent"]]
    assert dices.count(1.0) == (6 if kind in ("missing", "masks") else 7)
    assert dices.count(0.0) == (1 if kind in ("missing", "masks") else 0)


def test_empty_and_cut_answers_are_scored_and_told(score: Score, saved: Write, tmp_path: Path) -> None:
    def change(records: list[dict[str, Any]]) -> None:
        records[0].update(answer=" ", masks=[])
        for index, record in enumerate(records):
            record["is_complete"] = index > 1

    metrics = score(saved(change))
    assert metrics["problems"] == {"empty": {"count": 1, "rows": ["set/test/0.png#liver"]}}
    assert rows_of(tmp_path / "out")[0]["dice"] == 0.0
    assert "2 answers were cut at the limit of length" in metrics["printed"] and metrics["counts"]["cut"] == 2


def test_a_set_of_another_size_says_so_in_the_output(
    score: Score, declare: Write, saved: Write, tmp_path: Path
) -> None:
    declared = declare("segmentation", expected_rows=452)
    score(saved(), benchmark=declared, refused="9 rows where 452 are expected")
    metrics = score(saved(), "--allow-row-count", benchmark=declared)
    assert any("not comparable" in note for note in metrics["notes"])
    assert "not comparable" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_figures_by_another_protocol_are_not_replaced_unasked(score: Score, tmp_path: Path) -> None:
    score(None)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    score(None, "--masks", "biomedparse", refused="holds figures by another protocol")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert score(None, "--masks", "biomedparse", "--overwrite")["protocol"]["masks"] == "biomedparse"


def test_rows_of_absent_structures_alone_are_scored_and_reported(
    score: Score, regions: Path, saved: Write, tmp_path: Path, write_lines: Write
) -> None:
    manifest = [json.loads(line) for line in (regions / "manifest.jsonl").read_text("utf-8").splitlines()]
    absent = [row for row in manifest if row["split"] == "test" and not row["mask"]]
    data = shutil.copytree(regions, tmp_path / "data")
    write_lines(data / "manifest.jsonl", absent)
    names = {f"{row['image']}#{row['target']}" for row in absent}

    def cite(records: list[dict[str, Any]]) -> None:
        records[:] = [record for record in records if record["id"] in names]
        records[0] |= {"masks": [encode_mask(np.zeros((16, 20), dtype=bool))], "codes": ["[C0_1]"]}

    def claim_much(records: list[dict[str, Any]]) -> None:
        cite(records)
        records[0]["masks"] = [{"size": [200_000, 200_000], "counts": [0, 200_000**2]}]

    asked: dict[str, Any] = {"benchmark": "segmentation", "data": data}
    score(saved(claim_much), **asked, refused="the mask is 200000 x 200000 pixels")  # before it fills the memory
    metrics = score(saved(cite), **asked)
    assert metrics["negatives"]["no_region_rate"]["value"] == 1 - 1 / len(names)
    assert metrics["negatives"]["false_mask_rate"]["value"] == 0.0  # the mask is empty
    assert "false_mask_rate" not in metrics["codes"]["answers"]
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--masks", "medsite"), "preset 'medsite': choose one of medsight"),
        (("--masks", "medsight", "--threshold", "0.3"), "preset 'medsight' fixes threshold"),
        (("--answers", "strict"), "benchmark segmentation has no answers to score"),
        (("--limit", "0"), "'--limit': Input should be greater than or equal to 1"),
        *(
            (("--predictions", "mine.jsonl", option), f"leave out {option.partition('=')[0]}")
            for option in ("--model=x", "--batch-size=5", "--max-new-tokens=9", "--device=nonsense", "--dtype=float16")
        ),
    ],
)
def test_wrong_options_are_refused(score: Score, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    score(None, *options, refused=message)
    assert not (tmp_path / "out").exists()


def test_flags_in_place_of_a_preset_stand_in_the_protocol(score: Score, saved: Write) -> None:
    protocol = score(saved(), "--multi", "union", "--missing", "skip")["protocol"]
    chosen = {"threshold": 0.5, "missing": "skip", "multi": "union", "formula": "plain", "average": "micro"}
    assert protocol == {"masks": "flags", "mask_flags": chosen}


def test_questions_are_counted_and_scored_by_the_named_protocol(
    score: Score, declare: Write, tmp_path: Path, write_lines: Write, draw_picture: Any
) -> None:
    draw_picture(tmp_path / "data" / "a.png")
    asked = [("yes", "CLOSED"), ("no", "CLOSED"), ("left lung", "OPEN"), ("no", "CLOSED")]
    answers = ["Yes, it is.", "It looks normal.", "in the left", "yes and no"]
    questions = [
        {"id": i, "image": "a.png", "question": "Q?", "answer": a, "answer_type": t, "split": "test"}
        for i, (a, t) in enumerate(asked)
    ]
    write_lines(tmp_path / "data" / "questions.jsonl", questions)
    saved = write_lines(tmp_path / "saved.jsonl", [{"id": str(i), "answer": a} for i, a in enumerate(answers)])
    declared = declare("vqa-rad", expected_rows=4)
    results = {
        name: score(saved, "--answers", name, benchmark=declared, data=tmp_path / "data", output=name)
        for name in ("llava-med", "strict")
    }
    # "no" is found in "normal" by the published protocol; the strict one refuses an answer that holds both.
    assert [row["answer_score"] for row in rows_of(tmp_path / "llava-med")] == [1.0, 1.0, 0.5, 1.0]
    assert [row["answer_score"] for row in rows_of(tmp_path / "strict")] == [1.0, 0.0, 0.5, None]
    assert results["strict"]["refused"] == {"answer": {"the answer holds both yes and no": 1}}
    assert results["llava-med"]["counts"]["closed"] == 3 and results["llava-med"]["counts"]["open"] == 1
    assert results["llava-med"]["scores"]["closed_accuracy"]["micro"]["value"] == 1.0
    assert results["strict"]["protocol"] == {"answers": "strict"}
