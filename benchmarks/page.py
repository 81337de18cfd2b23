"""docs/performance.md, written from performance.template.md and the JSON files of results/.

In the template, `{RUN FIELD}` is a figure: a field of a run's first row or of its facts. `{RUN FIELD; COLUMN=VALUE}`
takes the first row that has this number in a column, or a text that begins so; several conditions may be given. Fields
of every run are `command`, what to type, and `machine`, where it was measured.
"""

import json
import re
from pathlib import Path
from typing import Any

from medsight.files import write_text

from .measuring import NOT_MEASURED, cell


HERE = Path(__file__).resolve().parent
TEMPLATE = HERE / "performance.template.md"
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "performance.md"
FIGURE = re.compile(r"\{([a-z0-9-]+) (\w+)((?:; \w+=[^;}]+)*)\}")
TRAINING_8B = "training --preset 8b --device cuda --batch-size 4 --peak-tflops 989"  # an H100 SXM's in bf16

RUNS = {
    "cpu-masks-cost": "masks_cost --preset nano --device cpu --batch-size 1",
    "cpu-batches": "batches --preset nano --device cpu",
    "cpu-stage-1": "training --recipe nano --stage perceiver --steps 50 --set stages.language_model=null",
    "cpu-quantised": "quantised --data ../shared/data/segmentation --items 64 --device cpu",
    "cpu-startup": "startup --preset small --device cpu",
    "cpu-load-8b": "startup --preset 8b --device cpu --only load --repeats 1",
    "cpu-two-step": "two_step --device cpu",
    "gpu-masks-cost": "masks_cost --preset 8b --device cuda --batch-size 1 8",
    "gpu-decoding": "decoding --preset 8b --device cuda --batch-size 1 --cache static",
    "gpu-decoding-32": "decoding --preset 8b --device cuda --batch-size 32 --cache static",
    "gpu-decoding-dynamic": "decoding --preset 8b --device cuda --batch-size 1 32 --cache dynamic",
    "gpu-perceiver": "perceiver --preset 8b --device cuda --batch-size 1 8",
    "gpu-batches": "batches --preset 8b --device cuda",
    "gpu-stage-1": "training --recipe nano --stage perceiver --steps 200 --set stages.language_model=null "
    "training.dataloader_num_workers=7",
    "gpu-training": f"{TRAINING_8B} --options checkpointing adamw-8bit",
    "gpu-training-full": f"{TRAINING_8B} --method full --options checkpointing+adamw-8bit",
}


FIRST = {"cpu": "cpu-masks-cost", "gpu": "gpu-masks-cost"}  # whose machine the page names


def command_of(run: str) -> str:
    """What to type for a run, from a checkout."""
    return f"python -m benchmarks.{RUNS[run]}"


def read(results: Path) -> dict[str, dict[str, Any]]:
    """What was measured, by run."""
    files = {run: results / f"{run}.json" for run in RUNS}
    return {run: json.loads(path.read_text(encoding="utf-8")) for run, path in files.items() if path.is_file()}


def write(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write the page from the files of a folder."""
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, render(TEMPLATE.read_text(encoding="utf-8"), read(results)))


def render(template: str, measured: dict[str, dict[str, Any]]) -> str:
    """The template with its figures.

    Raises:
        ValueError: a figure names no run, no row or no field.
    """
    return FIGURE.sub(lambda found: figure(measured, *found.groups()), template)


def figure(measured: dict[str, dict[str, Any]], run: str, field: str, conditions: str = "") -> str:
    """One figure, as it stands in a table."""
    if run not in RUNS:
        raise ValueError(f"{run}: expected a run, of {', '.join(RUNS)}")
    if field == "command":
        return f"`{command_of(run)}`"
    if run not in measured:
        return NOT_MEASURED
    record, first = measured[run], FIRST[run.partition("-")[0]]
    if field == "machine":
        return machine(record["machine"])
    if first in measured and device(measured[first]["machine"]) != device(record["machine"]):
        return NOT_MEASURED
    wanted = [condition.split("=", 1) for condition in conditions.split("; ")[1:]]
    rows = [row for row in record["rows"] if all(holds(row[column], value) for column, value in wanted)]
    if not rows:
        raise ValueError(f"{run}: no row{conditions}")
    known = {**record["facts"], **rows[0]}
    if known.get("why"):
        return NOT_MEASURED
    if field not in known:
        raise ValueError(f"{run}: no {field} among {', '.join(known)}")
    value = known[field]
    if value is None or not field.endswith("_bytes"):
        return cell(value)
    return f"{cell(value / 1e9)} GB" if value >= 1e9 else f"{cell(value / 1e6)} MB"


def holds(given: str | int, wanted: str) -> bool:
    """Whether a number is, or a text begins with, what is wanted."""
    return given.startswith(wanted) if isinstance(given, str) else given == int(wanted)


def machine(where: dict[str, Any]) -> str:
    """Where a result was measured, in a line."""
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items() if number)
    return f"{device(where)}; Python {where['python']}, {versions}"


def device(where: dict[str, Any]) -> str:
    """What a result was measured on."""
    return where["gpu"] or f"{where['cores']} cores of {where['processor']}, threads used: {where['threads']}"
