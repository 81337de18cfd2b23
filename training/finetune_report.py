"""report.html of a fine-tuning: gains on the new test rows, losses on the old ones, curves, examples."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from PIL import Image

from medsight import __version__
from medsight.evaluation.benchmarks import load_benchmark
from medsight.evaluation.cases import Case
from medsight.evaluation.compare import compare, read_evaluation
from medsight.evaluation.predictions import Prediction, read_predictions
from medsight.evaluation.readers import read_cases
from medsight.evaluation.report_cases import case_picture
from medsight.evaluation.runner import PREDICTIONS
from medsight.files import write_text

from .trainer import STEPS_FILE


TEMPLATE = Path(__file__).with_name("finetune.html.jinja")
EXAMPLES = 6
POINTS = 120  # of a curve
WIDTH, HEIGHT = 320, 110  # of a curve, in its own units
NAMES = {"new": "new test rows", "old": "old test rows"}


def write_report(output: Path, parts: Sequence[str]) -> None:
    """Write report.html from the evaluations before and after and the run's logs.

    Args:
        output: folder of the fine-tuning.
        parts: "new", and "old" where old data were scored.

    Raises:
        OSError, ValueError: an evaluation is missing or damaged.
    """
    recipe = yaml.safe_load((output / "finetune.yaml").read_text(encoding="utf-8"))
    tables = [{"title": NAMES[part], **table_of(output, part)} for part in parts]
    page = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(TEMPLATE.read_text(encoding="utf-8"))
        .render(
            name=output.name,
            version=__version__,
            tables=tables,
            curves=[curve for stage in recipe["stages"] for curve in curves_of(output, stage)],
            examples=examples_of(output),
            width=WIDTH,
            height=HEIGHT,
            stages=recipe["stages"],
        )
    )
    write_text(output / "report.html", page)


def table_of(output: Path, part: str) -> dict[str, Any]:
    """Dice before and after: of all rows, and by structure, with how often it got a mask, and its name was said."""
    before, after = output / "before" / part, output / "after" / part
    dice = compare(before, after)["scores"]["dice"]
    rows_before, rows_after = read_evaluation(before)[1], read_evaluation(after)[1]
    structures: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for identity, row in rows_before.items():
        if row.get("dice") is not None:
            structures.setdefault(identity.rpartition("#")[2], []).append((row, rows_after[identity]))
    lines = [
        {
            "name": name,
            "rows": len(pairs),
            "before": _mean(row["dice"] for row, _ in pairs),
            "after": _mean(row["dice"] for _, row in pairs),
            "found": _mean(row["n_masks"] > 0 for _, row in pairs),
            "named": _mean(name.lower() in row["answer"].lower() for _, row in pairs),
        }
        for name, pairs in sorted(structures.items())
    ]
    return {"dice": dice, "lines": lines}


def _mean(values: Any) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)


def curves_of(output: Path, stage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The loss of a stage over its steps, as points of a line; none where it made no step."""
    file = output / "training" / "stages" / stage["name"] / STEPS_FILE
    if not file.is_file():
        return []
    losses = [json.loads(line)["loss"] for line in file.read_text(encoding="utf-8").splitlines()]
    width = max(1, len(losses) // POINTS)
    means = [_mean(losses[start : start + width]) for start in range(0, len(losses), width)]
    low, high = min(means), max(means)
    scale = (high - low) or 1.0
    points = [
        f"{WIDTH * place / max(1, len(means) - 1):.1f},{HEIGHT * (1 - (mean - low) / scale):.1f}"
        for place, mean in enumerate(means)
    ]
    return [{"name": stage["name"], "steps": len(losses), "low": low, "high": high, "points": " ".join(points)}]


def examples_of(output: Path) -> list[dict[str, Any]]:
    """New test rows, from the worst to the best after training, each as it was answered before and after."""
    cases = [case for case in read_cases(load_benchmark("segmentation"), output / "data.yaml")[0] if case.masks]
    scores = read_evaluation(output / "after" / "new")[1]
    cases.sort(key=lambda case: scores[case.id]["dice"])
    count = min(EXAMPLES, len(cases))
    chosen = [cases[round(place * (len(cases) - 1) / max(1, count - 1))] for place in range(count)]
    answers = {
        when: {entry.id: entry for _, entry in read_predictions(output / when / "new" / PREDICTIONS)}
        for when in ("before", "after")
    }
    return [_example(case, {when: given[case.id] for when, given in answers.items()}, scores) for case in chosen]


def _example(case: Case, answers: Mapping[str, Prediction], scores: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": case.prompt.replace("<image>", "").strip(),
        "dice": scores[case.id]["dice"],
        "shown": [
            {"when": when, "answer": answer.answer, "picture": _embedded(case_picture(case, answer))}
            for when, answer in answers.items()
        ],
    }


def _embedded(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=84)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
