"""Every benchmark runs on the smallest model and gives the fields that it says; none of the figures is a result."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import inference, measuring, startup, training
from configuration_medsight.configuration_medsight import PRESETS
from tests.training.tiny_run import draw_data, only, tiny_recipe


CPU = torch.device("cpu")
SPREADS = ("ratio", "_s", "_ms", "per_s")
BENCHMARKS: dict[str, dict[str, Any]] = {
    "masks_cost": {"preset": "tiny", "batch_sizes": [1, 2]},
    "decoding": {"preset": "tiny", "batch_size": 2},
    "perceiver": {"preset": "tiny", "batch_sizes": [1, 2]},
    "batches": {"preset": "tiny"},
    "two_step": {"batch_size": 3},
}


@pytest.fixture(autouse=True)
def _gradients_stay_on() -> Iterator[None]:
    with torch.enable_grad():
        yield


def check_fields(rows: list[dict[str, Any]], documented: str | None) -> None:
    for row in rows:
        for field, value in row.items():
            assert documented is not None and field in documented
            if isinstance(value, dict):
                assert field.endswith(SPREADS) and math.isfinite(value["median"])
                assert value["low"] <= value["median"] <= value["high"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_gives_what_it_says(name: str) -> None:
    benchmark = getattr(inference, name)
    rows = benchmark(CPU, **BENCHMARKS[name], repeats=1, warmup=0)
    check_fields(rows, benchmark.__doc__)
    assert [row["batch_size"] for row in rows] == BENCHMARKS[name].get("batch_sizes", [rows[0]["batch_size"]])


def test_quantised_masks_are_compared_with_those_of_the_same_answers(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    manifest = draw_data(tmp_path / "data") / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"split": "train"', '"split": "test"'))
    rows = inference.quantised(CPU, tmp_path / "data", items=2)
    check_fields(rows, inference.quantised.__doc__)
    plain, *others = rows
    assert plain["dice"] == plain["same_answers"] == 1 and plain["masks"] > 0
    for row in others:
        assert row["language_model_bytes"] < plain["language_model_bytes"]
        assert row["other_bytes"] == plain["other_bytes"] and 0 < row["dice"] <= 1


def test_a_sharded_checkpoint_is_loaded_in_a_process_of_its_own() -> None:
    (row,) = startup.loading(CPU, "tiny", repeats=1)
    check_fields([row], startup.loading.__doc__)
    assert row["what"].startswith("load tiny, ") and int(row["what"].split()[2]) > 1 and row["file_bytes"] > 0


@pytest.mark.slow
def test_a_sharded_checkpoint_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a size beside which what Python itself takes is small."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell a process' memory")
    small = PRESETS["small"]
    middle = {
        "text_config": {**small["text_config"], "vocab_size": 8192, "num_hidden_layers": 8},
        "vision_config": {**small["vision_config"], "num_hidden_layers": 4},
        "image_token_id": 7000,
        "region_code_start_id": 7168,
    }
    monkeypatch.setitem(PRESETS, "middle", middle)
    (row,) = startup.loading(CPU, "middle", repeats=1)
    assert row["file_bytes"] > 3e8 and int(row["what"].split()[2]) > 3
    assert 0.9 < row["ratio"]["median"] <= 1.1
    assert row["private_ratio"]["median"] < 0.2, "weights are copied instead of mapped"


def test_a_real_run_is_timed(tmp_path: Path) -> None:
    data = draw_data(tmp_path / "data")
    stages = {**only("perceiver"), "perceiver": {"max_steps": 4, "example_images": 0, "eval_strategy": "no"}}
    row = training.time_run(tiny_recipe(data, tmp_path / "run", stages=stages), "perceiver")
    check_fields([row], training.training.__doc__)
    assert row["batch_size"] == 3 and 0 < row["waiting_share"] < 1
    assert row["images_per_s"] == pytest.approx(3 / row["step_s"])


def test_rounds_alternate_and_spreads_are_quartiles() -> None:
    order: list[str] = []
    cases = {name: lambda name=name: order.append(name) for name in "ab"}  # type: ignore[misc]
    times = measuring.paired(cases, CPU, repeats=2, warmup=1)
    assert "".join(order) == "ab" + "ab" + "ba"
    assert [len(values) for values in times.values()] == [2, 2]
    assert measuring.spread([5, 1, 2, 3, 4]) == {"median": 3, "low": 2, "high": 4}
    assert measuring.ratio([2, 9], [1, 3]) == {"median": 2.5, "low": 2.25, "high": 2.75}
