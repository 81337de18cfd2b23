"""The U-Net that a model is held against: same rows, same places, and predictions that `medsight evaluate` scores."""

import json
from pathlib import Path

import pytest
import yaml

from medsight.cli import main as medsight
from medsight.evaluation.readers import NoRowsError
from medsight.training.baselines import unet
from medsight.training.corpus import read_corpus
from medsight.training.held_out import held_out_items
from tests.training.tiny_run import tiny_recipe, tiny_values


@pytest.fixture(scope="module")
def recipe_file(drawn_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_values(drawn_data, Path("unused"))), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The segmentation benchmark on training rows: the drawn data have no others."""
    file = tmp_path_factory.mktemp("declared") / "drawn.yaml"
    file.write_text(yaml.safe_dump({"drawn": {"like": "segmentation", "split": "train", "expected_rows": None}}))
    return file


@pytest.fixture(scope="module")
def trained(recipe_file: Path, benchmark: Path, drawn_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unet") / "out"
    options = f"--size 32 --threads 1 --steps 32 --benchmark {benchmark} --data {drawn_data}".split()
    assert unet.main([str(recipe_file), "--output", str(output), *options]) == 0
    return output


def test_it_learns_and_says_how(trained: Path, recipe_file: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == [unet.PREDICTIONS, unet.SUMMARY]
    assert [path.name for path in trained.parent.iterdir()] == [trained.name]
    summary = json.loads((trained / unet.SUMMARY).read_text(encoding="utf-8"))
    assert (summary["steps"], summary["images"], summary["threads"]) == (32, 32 * unet.BATCH_SIZE, 1)
    assert [entry["steps"] for entry in summary["validation"]] == [8, 16, 24, 32]
    last = summary["validation"][-1]
    assert set(last["sets"]) == {"busi", "sunnybrook", "totalsegmentator"}
    assert last["dice_sets"] == pytest.approx(sum(last["sets"].values()) / 3)
    assert last["dice_sets"] > 0.7 and last["dice"] > 0.7


def test_its_predictions_are_scored(
    trained: Path, benchmark: Path, drawn_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = ["--benchmark", str(benchmark), "--data", str(drawn_data), "--output", str(tmp_path / "scores")]
    assert medsight(["evaluate", *scored, "--predictions", str(trained / unet.PREDICTIONS)]) == 0, capsys.readouterr()
    metrics = json.loads((tmp_path / "scores/metrics.json").read_text(encoding="utf-8"))
    assert metrics["n"] == 25 and not metrics["problems"]
    assert metrics["scores"]["dice"]["micro"]["value"] > 0.7


def test_held_out_rows_are_those_of_the_sources(drawn_data: Path) -> None:
    """Two sources of one folder, and one without a folder for tests."""
    folder = {"layout": "biomedparse", "path": str(drawn_data)}
    parts = {"regions": [{**folder, "where": {"site": site}} for site in ("breast", "torso")]}
    corpus = read_corpus(tiny_recipe(drawn_data, Path("unused"), data=parts))
    held = {item.images[0]["path"] for item in held_out_items(corpus, "segmentation")}
    assert held == {image["path"] for image in corpus.validation["image"]} and len(held) >= 2
    alone = {"regions": [{"layout": "biomedparse", "path": str(drawn_data / "sunnybrook")}]}
    corpus = read_corpus(tiny_recipe(drawn_data, Path("unused"), data=alone))
    assert len(held_out_items(corpus, "segmentation")) == len(corpus.validation)
    with pytest.raises(NoRowsError, match="no validation row"):
        held_out_items(corpus, "diagnose-then-segment")
