"""Every benchmark runs on the smallest model and writes the fields that it says; none of the figures is a result."""

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measuring
from benchmarks.training import time_run
from medsight.checkpoint import shipped_checkpoint
from tests.training.tiny_run import draw_data, only, tiny_recipe


ROUNDS = ["--device", "cpu", "--repeats", "1", "--warmup", "0"]
TINY = ["--preset", "tiny", "--batch-size", "1", "2"]
SPREADS = {"median", "low", "high"}
# Arguments, the fields of every row, and those that are spreads.
BENCHMARKS: dict[str, tuple[list[str], set[str], set[str]]] = {
    "masks_cost": (
        [*TINY, "--new-tokens", "6", "--prompt-words", "8"],
        {"batch_size", "prompt_tokens", "new_tokens"},
        {"plain_s", "text_s", "masks_s", "text_ratio", "ratio"},
    ),
    "decoding": (
        [*TINY, "--new-tokens", "6", "--long", "9", "--prompt-words", "8"],
        {"cache", "batch_size"},
        {"prefill_ms", "token_ms", "ratio", "item_s", "items_per_s"},
    ),
    "perceiver": (TINY, {"batch_size", "pass_bytes", "codes_bytes"}, {"pass_s", "codes_s", "limit_ratio"}),
    "batches": (
        ["--preset", "tiny", "--batch-size", "4", "--new-tokens", "8", "--prompt-words", "8"],
        {"batch_size"},
        {"one_by_one_s", "together_s", "ratio"},
    ),
    "training": (
        ["--preset", "tiny", "--batch-size", "2", "--words", "16", "--method", "full", "--options", "checkpointing"],
        {"what", "batch_size", "peak_bytes"},
        {"step_s", "plain_s", "ratio", "utilisation"},
    ),
    "two_step": (["--model", "TINY", "--batch-size", "3"], {"batch_size", "codes"}, {"together_s", "ratio"}),
    # bitsandbytes' kernels for some CPUs want layers of whole blocks of 64
    "quantised": (
        ["--model", str(shipped_checkpoint()), "--items", "2", "--new-tokens", "4"],
        {"what", "load_s"},
        set(),
    ),
}


@pytest.fixture(autouse=True)
def _gradients_stay_on() -> Iterator[None]:
    with torch.enable_grad():
        yield


def run(name: str, arguments: list[str], output: Path) -> dict[str, Any]:
    """What a benchmark returns, which must be what it wrote."""
    record = importlib.import_module(f"benchmarks.{name}").main([*arguments, *ROUNDS, "--output", str(output)])
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(record))
    assert list(written) == ["benchmark", "command", "settings", "machine", "facts", "rows"]
    assert written["benchmark"] == name and written["machine"]["versions"]["torch"]
    assert not list(output.parent.glob("*.partial"))
    return written


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_writes_what_it_says(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    given, fields, spreads = BENCHMARKS[name]
    arguments = [str(tiny_checkpoint) if argument == "TINY" else argument for argument in given]
    rows = run(name, arguments, tmp_path / "results" / "record.json")["rows"]
    for row in rows:
        assert fields | spreads <= set(row)
        for field in spreads:
            assert set(row[field]) == SPREADS and row[field]["low"] <= row[field]["median"] <= row[field]["high"]
            assert math.isfinite(row[field]["median"])
    documented = importlib.import_module(f"benchmarks.{name}").__doc__ or ""
    assert all(field in documented for row in rows for field in row)


def test_times_of_starting_up(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """One part, so as not to start five processes: loading, whose file is random and sharded."""
    arguments = ["--model", str(tiny_checkpoint), "--preset", "tiny", "--only", "load", "--folder", str(tmp_path)]
    (row,) = run("startup", arguments, tmp_path / "record.json")["rows"]
    assert row["what"].startswith("load tiny, ") and int(row["what"].split()[2]) > 1
    assert row["file_bytes"] > 0 and set(row["ratio"]) == set(row["private_ratio"]) == SPREADS


def test_a_real_run_is_timed(tmp_path: Path) -> None:
    data = draw_data(tmp_path / "data")
    stages = {**only("perceiver"), "perceiver": {"max_steps": 4, "example_images": 0, "eval_strategy": "no"}}
    recipe = tiny_recipe(data, tmp_path / "run", stages=stages)
    row = time_run(recipe, "perceiver")
    assert row["batch_size"] == 3 and 0 < row["waiting_share"] < 1
    assert row["images_per_s"] == pytest.approx(3 / row["step_s"])


def test_rounds_alternate_and_spreads_are_quartiles() -> None:
    options = measuring.parser("benchmarks.x", None).parse_args(["--repeats", "2", "--warmup", "1"])
    order: list[str] = []
    cases = {name: lambda name=name: order.append(name) for name in "ab"}  # type: ignore[misc]
    times = measuring.paired(cases, options, torch.device("cpu"))
    assert "".join(order) == "ab" + "ab" + "ba"
    assert [len(values) for values in times.values()] == [2, 2]
    assert measuring.spread([5, 1, 2, 3, 4]) == {"median": 3, "low": 2, "high": 4}
    assert measuring.ratio([2, 9], [1, 3]) == {"median": 2.5, "low": 2, "high": 3}
