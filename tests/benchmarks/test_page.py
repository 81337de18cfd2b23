"""docs/performance.md shows what was measured, and nothing that was not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import page


TEMPLATE = page.TEMPLATE.read_text(encoding="utf-8")
SPREAD = {"median": 0.98765, "low": 0.5, "high": 12.345}
MACHINE = {"gpu": None, "threads": 2, "cores": 4, "processor": "Chip", "python": "3.11.2", "versions": {"torch": "2"}}


def record(*rows: dict[str, Any], processor: str = "Chip") -> dict[str, Any]:
    return {"rows": list(rows), "machine": {**MACHINE, "processor": processor}}


def test_the_page_is_the_template_and_the_results() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.render(TEMPLATE, page.read())


def test_every_run_stands_in_the_page_and_every_result_is_of_a_run() -> None:
    assert [run for run in command.RUNS if f"`{run}`" not in TEMPLATE or f'("{run}"' not in TEMPLATE] == []
    assert set(page.read()) <= set(command.RUNS)


def test_figures_of_another_machine_than_the_table_names_are_left_out() -> None:
    template = '{{ figures("cpu-batches", "ratio") }} {{ figures("gpu-batches", "ratio") }}'
    measured = {run: record({"ratio": 2.5}) for run in ("cpu-masks-cost", "cpu-batches", "gpu-batches")}
    assert page.render(template, measured) == "2.5 2.5"
    measured["cpu-masks-cost"] = record({"ratio": 1.5}, processor="Another")
    assert page.render(template, measured) == "not measured 2.5"


def test_figures_come_from_the_row_that_they_name() -> None:
    rows = (
        {"what": "a", "batch_size": 1, "ratio": SPREAD, "s": None},
        {"what": "b", "batch_size": 16, "ratio": 123.4, "peak_bytes": 2_340_000_000, "limit_ms": 0.00001234},
    )
    measured = {"gpu-decoding": record(*rows)}
    for call, expected in {
        'figures("gpu-decoding", "ratio", "s")': "0.988 (0.5–12.3) | not measured",
        'figures("gpu-decoding", "ratio", batch_size=16)': "123",
        'figures("gpu-decoding", "peak_bytes", "limit_ms", what="b")': "2.34 GB | 0.00001",
        'figures("cpu-batches", "ratio", "s")': "not measured | not measured",
        'machine("gpu-decoding")': "4 cores of Chip, threads used: 2; Python 3.11.2, torch 2",
    }.items():
        assert page.render(f"| {{{{ {call} }}}} |", measured) == f"| {expected} |"
    with pytest.raises(ValueError, match="gpu-decoding: no row with"):
        page.render('{{ figures("gpu-decoding", "ratio", batch_size=2) }}', measured)
    with pytest.raises(KeyError, match="speed"):
        page.render('{{ figures("gpu-decoding", "speed") }}', measured)


def half(device: torch.device, of: float) -> list[dict[str, Any]]:
    if of == 0:
        raise ValueError("nothing to halve")
    return [{"ratio": of / 2, "device": device.type}]


@pytest.mark.slow
def test_runs_are_chosen_by_name_and_by_machine_and_one_that_fails_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = {"cpu-fails": (half, {"of": 0}), "cpu-batches": (half, {"of": 3}), "gpu-batches": (half, {"of": 5})}
    monkeypatch.setattr(command, "RUNS", runs)
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    assert command.main(["cpu"]) == 1 and "failed: cpu-fails" in capfd.readouterr().err
    (file,) = (tmp_path / "results").iterdir()
    written = json.loads(file.read_text(encoding="utf-8"))
    assert list(written) == ["benchmark", "command", "settings", "machine", "rows"]
    assert written["command"] == "python -m benchmarks cpu-batches" and written["settings"] == {"of": 3}
    assert written["rows"] == [{"ratio": 1.5, "device": "cpu"}] and written["machine"]["versions"]["torch"]
    assert "1.5" in (tmp_path / "page.md").read_text(encoding="utf-8")

    assert command.main(["cpu-batches", "--set", "of=8"]) == 0
    assert "ratio" in capfd.readouterr().out and json.loads(file.read_text(encoding="utf-8")) == written
    with pytest.raises(SystemExit):
        command.main(["tpu"])
