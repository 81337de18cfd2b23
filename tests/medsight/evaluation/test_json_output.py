"""`--json` of the verbs of evaluation: JSON objects, a line each, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path


def test_benchmarks_are_listed_a_line_each(verb: Callable) -> None:
    assert {"segmentation", "vqa-rad"} <= {line["benchmark"] for line in verb("evaluate", "--list")}


def test_evaluations_are_scored_and_compared(
    verb: Callable, named_checkpoint: Path, regions: Path, declare: Callable[..., Path], tmp_path: Path
) -> None:
    benchmark = declare("segmentation", expected_rows=None)
    for name in ("a", "b"):
        arguments = ["--benchmark", benchmark, "--data", regions, "--output", tmp_path / name, "--device", "cpu"]
        (metrics,) = verb("evaluate", *arguments, "--model", named_checkpoint, "--max-new-tokens", 4)
        assert metrics == json.loads((tmp_path / name / "metrics.json").read_text("utf-8"))
    (compared,) = verb("compare", tmp_path / "a", tmp_path / "b")
    assert compared["scores"]["dice"]["difference"] == 0


def test_codes_are_described(verb: Callable, named_checkpoint: Path, regions: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(named_checkpoint, tmp_path / "model"))
    (said,) = verb("codes", "--model", folder, "--data", regions, "--split", "test", "--device", "cpu")
    assert said == json.loads((folder / "region_codes.json").read_text("utf-8"))


def test_a_benchmark_is_made(verb: Callable, regions: Path, tmp_path: Path) -> None:
    (said,) = verb("benchmark", "build-diagseg", regions, "--output", tmp_path / "out")
    assert said["items"] > 0 and said["left_out"]["no diagnosis"] == 2
