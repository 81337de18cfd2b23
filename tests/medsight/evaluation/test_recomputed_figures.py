"""A benchmark's figures, recomputed from the files in plain Python and without any of the package's code."""

import json
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.medsight.metrics.test_medical_vqa import slow_score

from .test_evaluate import Evaluate, metrics_of, rows_of


WORDS = "the a left right lung liver mass two 2 none 0 tumor no normal yes cyst".split()
CODES = ["[C0_1]", "[C0_2]", "[C1_1]", "[C12_3]"]


def plain_right_codes(cited: list[str], right: list[str]) -> tuple[float | None, float | None]:
    if not cited or not right:
        return None, None
    left, exact, in_group = list(right), 0, 0
    for code in cited:
        if code in left:
            left.remove(code)
            exact += 1
        if code.split("_")[0] in [other.split("_")[0] for other in right]:
            in_group += 1
    return exact / len(cited), in_group / len(cited)


def plain_pixels(runs: list[int]) -> set[int]:
    """Places of the pixels inside, counted down the columns."""
    inside, place = set(), 0
    for number, run in enumerate(runs):
        if number % 2:
            inside |= set(range(place, place + run))
        place += run
    return inside


def plain_runs(inside: set[int], total: int) -> list[int]:
    runs, value, length = [], False, 0
    for place in range(total):
        if (place in inside) != value:
            runs.append(length)
            value, length = not value, 0
        length += 1
    return [*runs, length]


def test_a_thousand_made_up_predictions_are_scored_as_plain_python_scores_them(
    evaluate: Evaluate, declare: Callable[..., Path], tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    width, height, generator = 11, 7, random.Random(5)
    cases, predictions, expected = [], [], []
    picture = tmp_path / "data" / "image.png"
    picture.parent.mkdir()
    Image.new("L", (width, height)).save(picture)
    for number in range(1000):
        modality = generator.choice(["CT", "MRI", "X-Ray"])
        references = []
        for part in range(generator.choice([0, 1, 1, 1, 2])):
            inside = set(generator.sample(range(width * height), generator.randint(1, 40)))
            mask = Image.new("1", (width, height))
            for place in inside:
                mask.putpixel((place // height, place % height), 1)
            mask.save(tmp_path / "data" / f"mask-{number}-{part}.png")
            references.append(inside)
        answer = " ".join(generator.choices(WORDS, k=generator.randint(0, 6))) + generator.choice(["", "."])
        reference = " ".join(generator.choices(WORDS, k=generator.randint(1, 3)))
        shown = [
            set(generator.sample(range(width * height), generator.randint(0, 40)))
            for _ in range(generator.choice([0, 1, 1, 2, 3]))
        ]
        cases.append(
            {"qa_id": f"q{number}", "question": "What?", "short_answer": reference, "image_file": "image.png",
             "mask_files": [f"mask-{number}-{part}.png" for part in range(len(references))], "modality": modality,
             "patient": f"p{number % 250}"}
        )  # fmt: skip
        encoded = [{"size": [height, width], "counts": plain_runs(inside, width * height)} for inside in shown]
        assert [plain_pixels(mask["counts"]) for mask in encoded] == shown
        cited, right = ([generator.choice(CODES) for _ in some] for some in (shown, references))
        predictions.append(
            {"id": f"q{number}", "answer": answer, "masks": encoded, "codes": cited, "reference_codes": right}
        )
        wanted = set().union(*references)
        dices = [
            (2 * len(inside & wanted) + 1e-8) / (len(inside) + len(wanted) + 1e-8) for inside in shown if references
        ]
        expected.append(
            {
                "modality": modality,
                "recall": slow_score(answer, reference, "OPEN"),
                "dice": (sum(dices) / len(dices) if dices else 0.0) if references else None,
                "false": not references and any(shown),
                "codes": plain_right_codes(cited, right),
            }
        )
    (tmp_path / "data" / "cases.json").write_text(json.dumps(cases))
    saved = write_lines(tmp_path / "saved.jsonl", predictions)
    declared = declare("diagseg")
    status, printed = evaluate(declared, tmp_path / "data", tmp_path / "out", "--predictions", str(saved))
    assert status == 0, printed

    rows = rows_of(tmp_path / "out")
    for row, plain in zip(rows, expected, strict=True):
        assert row["answer_score"] == pytest.approx(plain["recall"], abs=1e-12), row
        assert row["dice"] == (None if plain["dice"] is None else pytest.approx(plain["dice"], abs=1e-12)), row
        assert (row["code_accuracy"], row["group_accuracy"]) == pytest.approx(plain["codes"]), row
    metrics = metrics_of(tmp_path / "out")
    by_modality: dict[str, list[float]] = defaultdict(list)
    for plain in expected:
        if plain["dice"] is not None:
            by_modality[plain["modality"]].append(plain["dice"])
    means = {name: sum(some) / len(some) for name, some in by_modality.items()}
    everything = [dice for some in by_modality.values() for dice in some]
    dice = metrics["scores"]["dice"]
    assert dice["micro"]["value"] == pytest.approx(sum(everything) / len(everything), abs=1e-6)
    assert dice["macro"]["value"] == pytest.approx(sum(means.values()) / 3, abs=1e-6)
    assert {name: found["dice"]["value"] for name, found in metrics["by"]["modality"].items()} == {
        name: pytest.approx(mean, abs=1e-6) for name, mean in means.items()
    }
    recall = metrics["scores"]["answer"]["micro"]
    assert (recall["n"], recall["value"]) == (1000, pytest.approx(sum(p["recall"] for p in expected) / 1000, abs=1e-6))
    false = [plain["false"] for plain in expected if plain["dice"] is None]
    assert metrics["negatives"]["false_mask_rate"]["value"] == pytest.approx(sum(false) / len(false), abs=1e-6)
    for kind in ("micro", "macro"):
        assert dice[kind]["low"] < dice[kind]["value"] < dice[kind]["high"]
    assert metrics["interval_unit"] == "patient or image" and recall["units"] == 250
    for index, name in enumerate(("code_accuracy", "group_accuracy")):
        known = [plain["codes"][index] for plain in expected if plain["codes"][index] is not None]
        found = metrics["scores"][name]["micro"]
        assert (found["n"], found["value"]) == (len(known), pytest.approx(sum(known) / len(known), abs=1e-6))
        assert metrics["codes"]["answers"][name] == pytest.approx(sum(known) / len(known), abs=1e-12)
        assert 0 < found["value"] < 1 and metrics["by"]["modality"]["CT"][name]["n"] < len(known)
