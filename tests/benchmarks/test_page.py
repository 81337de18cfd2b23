"""docs/performance.md shows what was measured, and nothing that was not."""

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import page


TEMPLATE = page.TEMPLATE.read_text(encoding="utf-8")
FIGURES = [found.groups() for found in page.FIGURE.finditer(TEMPLATE)]
SPREAD = {"median": 0.98765, "low": 0.5, "high": 12.345}
MACHINE = {
    "gpu": None,
    "threads": 2,
    "cores": 4,
    "processor": "Chip",
    "python": "3.11.2",
    "versions": {"torch": "2.9"},
}


def record(*rows: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return {"rows": list(rows), "facts": facts, "machine": MACHINE}


def test_the_page_is_the_template_and_the_results() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.render(TEMPLATE, page.read(page.RESULTS))


def test_no_brace_of_the_template_is_a_figure_misspelt() -> None:
    left = page.FIGURE.sub("", TEMPLATE)
    assert not [line for line in left.splitlines() for run in page.RUNS if run in line]


@pytest.mark.parametrize(("run", "field", "conditions"), sorted(set(FIGURES)))
def test_a_figure_is_of_a_run_whose_benchmark_has_it(run: str, field: str, conditions: str) -> None:
    documented = importlib.import_module(f"benchmarks.{page.RUNS[run].split()[0]}").__doc__ or ""
    fields = [field, *(condition.split("=")[0] for condition in conditions.split("; ")[1:])]
    for name in set(fields) - {"command", "machine"}:
        assert name.removesuffix("_s") in documented, name


def test_every_run_stands_in_the_page() -> None:
    assert set(page.RUNS) == {run for run, _, _ in FIGURES}


def test_figures_of_another_machine_than_the_table_names_are_left_out() -> None:
    first, other = record({"ratio": 1.5}), record({"ratio": 2.5})
    measured = {"cpu-masks-cost": first, "cpu-batches": other, "gpu-batches": other}
    assert page.render("{cpu-batches ratio} {gpu-batches ratio}", measured) == "2.5 2.5"
    measured["cpu-masks-cost"] = {**first, "machine": {**MACHINE, "processor": "Another"}}
    assert page.render("{cpu-batches ratio} {gpu-batches ratio}", measured) == "not measured 2.5"


def test_figures_come_from_the_row_that_they_name() -> None:
    measured = {
        "gpu-decoding": record(
            {"cache": "static", "batch_size": 1, "ratio": SPREAD},
            {"cache": "static", "batch_size": 16, "ratio": None},
            {"cache": "dynamic", "batch_size": 16, "ratio": 123.4},
            limit_ms=0.00001234,
        ),
        "cpu-startup": record(
            {"what": "imports, over a", "ratio": 1.0}, {"what": "load, 5 files", "peak_bytes": 2_340_000_000}
        ),
        "gpu-training": record({"what": "stage 4 + fused-loss", "step_s": None, "why": "no such package"}),
    }
    for template, expected in {
        "{gpu-decoding ratio}": "0.988 (0.5–12.3)",
        "{gpu-decoding ratio; batch_size=1}": "0.988 (0.5–12.3)",
        "{gpu-decoding ratio; batch_size=16}": "not measured",
        "{gpu-decoding ratio; cache=dynamic; batch_size=16}": "123",
        "{gpu-decoding limit_ms}": "0.00001",
        "{cpu-startup peak_bytes; what=load}": "2.34 GB",
        "{cpu-startup ratio; what=imports, over}": "1",
        "{cpu-startup machine}": "4 cores of Chip, threads used: 2; Python 3.11.2, torch 2.9",
        "{gpu-training utilisation; what=stage 4}": "not measured",
        "{cpu-batches ratio; batch_size=8}": "not measured",
        "{cpu-batches command}": "`python -m benchmarks.batches --preset nano --device cpu`",
    }.items():
        assert page.render(f"| {template} |", measured) == f"| {expected} |"
    for wrong, message in {
        "{cpu-other ratio}": "cpu-other: expected a run",
        "{gpu-decoding speed}": "gpu-decoding: no speed among",
        "{gpu-decoding ratio; batch_size=2}": "gpu-decoding: no row; batch_size=2",
    }.items():
        with pytest.raises(ValueError, match=message):
            page.render(wrong, measured)


def test_runs_are_chosen_by_name_and_by_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Done:
        returncode = 0

    def run(arguments: list[str], check: bool) -> Done:
        started.append(arguments[1:])
        Done.returncode = int("benchmarks.batches" in arguments)
        return Done()

    monkeypatch.setattr(command.subprocess, "run", run)
    where = ["--results", str(tmp_path / "results"), "--page", str(tmp_path / "page.md")]
    assert command.main([*where, "cpu", "gpu-decoding"]) == 1
    assert [arguments[1] for arguments in started] == [
        f"benchmarks.{text.split()[0]}" for run, text in page.RUNS.items() if run[:3] == "cpu" or run == "gpu-decoding"
    ]
    assert started[0][-2:] == ["--output", os.path.relpath(tmp_path / "results/cpu-masks-cost.json")]
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page.render(TEMPLATE, {})
    with pytest.raises(SystemExit):
        command.main(["tpu"])
