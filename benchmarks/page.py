"""docs/performance.md, written from performance.template.md and the JSON files of results/.

The template is Jinja's. `figures(RUN, FIELD, …, COLUMN=VALUE)` are cells of a table: fields of the run's first row
that has these values. `machine(RUN)` is where it was measured.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from medsight.files import write_text

from .measuring import NOT_MEASURED, cell


HERE = Path(__file__).resolve().parent
TEMPLATE = HERE / "performance.template.md"
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "performance.md"
Records = dict[str, dict[str, Any]]  # what was measured, by run


def read() -> Records:
    """What was measured."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}


def write() -> None:
    """Writes the page from the template and the results."""
    write_text(PAGE, render(TEMPLATE.read_text(encoding="utf-8"), read()))


def render(template: str, records: Records) -> str:
    """The template with its figures.

    Raises:
        ValueError: a figure names no row.
        KeyError: a figure names no field.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # noqa: S701  Markdown
    return environment.from_string(template).render(
        figures=partial(figures, records), machine=partial(machine, records)
    )


def figures(records: Records, run: str, *fields: str, **conditions: Any) -> str:
    """Figures of one row, as they stand in a table beside each other."""
    record, first = records.get(run), records.get(f"{run[:3]}-masks-cost")  # whose machine the page names
    if record is None or first and device(first["machine"]) != device(record["machine"]):
        return " | ".join(NOT_MEASURED for _ in fields)
    for row in record["rows"]:
        if conditions.items() <= row.items():
            return " | ".join(figure(row[field], field) for field in fields)
    raise ValueError(f"{run}: no row with {conditions}")


def figure(value: Any, field: str) -> str:
    """A value as the page shows it."""
    if value is None or not field.endswith("_bytes"):
        return cell(value)
    return f"{cell(value / 1e9)} GB" if value >= 1e9 else f"{cell(value / 1e6)} MB"


def machine(records: Records, run: str) -> str:
    """Where a result was measured, in a line."""
    if run not in records:
        return NOT_MEASURED
    where = records[run]["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items() if number)
    return f"{device(where)}; Python {where['python']}, {versions}"


def device(where: dict[str, Any]) -> str:
    """What a result was measured on."""
    return where["gpu"] or f"{where['cores']} cores of {where['processor']}, threads used: {where['threads']}"
