"""The U-Net that a model is held against: same rows, same places, and predictions that `medsight evaluate` scores."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from medsight.cli import main as medsight
from medsight.evaluation.readers import NoRowsError
from medsight.training.baselines import unet
from medsight.training.corpus import read_corpus
from medsight.training.held_out import held_out_items
from tests.training.tiny_run import tiny_recipe, tiny_values


SIZE = 32


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


def arguments(recipe_file: Path, output: Path, *more: str) -> list[str]:
    return [str(recipe_file), "--output", str(output), "--size", str(SIZE), "--threads", "1", *more]


@pytest.mark.parametrize("side", [16, 28, 33, 112])
def test_every_block_is_conditioned_and_a_mask_has_the_pictures_size(side: int) -> None:
    torch.manual_seed(0)
    network = unet.UNet(5, widths=(8, 8, 16, 16))
    logits = network(torch.randn(2, 3, side, side), torch.tensor([1, 4]))
    assert logits.shape == (2, side, side)
    logits.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    asked = network.classes.weight.grad.any(1)
    assert asked.tolist() == [False, True, False, False, True]


def test_its_default_size_is_the_one_that_was_measured() -> None:
    assert sum(parameter.numel() for parameter in unet.UNet(55).parameters()) == pytest.approx(1.3e6, rel=0.02)


def test_the_schedule_ends_with_the_budget() -> None:
    rates = [unet.learning_rate(spent / 100) for spent in range(101)]
    assert max(rates) == rates[2] == pytest.approx(unet.LEARNING_RATE, rel=1e-2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(unet.LEARNING_RATE * unet.LEAST)


def test_a_target_without_a_class_is_the_union_of_those_that_end_with_it() -> None:
    names = ["benign breast tumor", "breast", "liver", "malignant breast tumor", "tumor"]
    assert unet.classes_asked("breast tumor", names, "a.png") == [0, 3]
    assert unet.classes_asked("tumor", names, "a.png") == [4]  # one of that name counts alone
    with pytest.raises(ValueError, match=r"a\.png: target 'umor' is none of the 5 classes"):
        unet.classes_asked("umor", names, "a.png")


def test_a_batch_asks_one_class_a_picture_and_absent_ones_have_an_empty_mask(drawn_data: Path) -> None:
    recipe = tiny_recipe(drawn_data, Path("unused"), data={"validation_fraction": 0.0})
    corpus = read_corpus(recipe)
    dataset = unet.region_dataset(recipe, corpus, SIZE)
    assert len(dataset) == len(corpus.training) == 19
    drawn, again = (unet.batches(dataset, 0.5, seed=3, workers=number) for number in (0, 2))
    empty = set()
    for _ in range(12):
        pixels, asked, masks = next(drawn)
        assert pixels.shape == (unet.BATCH_SIZE, 3, SIZE, SIZE) and masks.shape == (unet.BATCH_SIZE, SIZE, SIZE)
        assert masks.min() >= 0 and masks.max() <= 1
        assert all(torch.equal(*pair) for pair in zip((pixels, asked, masks), next(again), strict=True))
        empty |= {corpus.classes[wanted] for wanted, mask in zip(asked, masks, strict=True) if not mask.any()}
    assert empty == {"benign breast tumor"}  # of the normal picture, which has no breast tumor


@pytest.fixture(scope="module")
def trained(recipe_file: Path, benchmark: Path, drawn_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unet") / "out"
    more = ["--steps", "32", "--benchmark", str(benchmark), "--data", str(drawn_data)]
    assert unet.main(arguments(recipe_file, output, *more)) == 0
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


def test_validation_is_the_recipes(drawn_data: Path) -> None:
    corpus = read_corpus(tiny_recipe(drawn_data, Path("unused")))
    held = {item.images[0]["path"] for item in held_out_items(corpus, "segmentation")}
    assert held == {image["path"] for image in corpus.validation["image"]}
    rows = [item for item in held_out_items(corpus, "segmentation") if not item.absent]
    assert len(rows) == sum(map(len, corpus.validation["targets"]))
    with pytest.raises(ValueError, match="the recipe's data have no test row"):
        held_out_items(corpus, "segmentation", "test")


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


def test_masks_lie_where_the_picture_does(drawn_data: Path) -> None:
    """A network that calls every pixel of the canvas inside gives the whole picture, and no more."""
    recipe = tiny_recipe(drawn_data, Path("unused"))
    corpus = read_corpus(recipe)
    canvas, items = unet.region_dataset(recipe, corpus, SIZE).canvas, held_out_items(corpus, "segmentation")
    network = unet.UNet(len(corpus.classes), widths=(8, 8))
    torch.nn.init.zeros_(network.head.weight)
    for bias, answers, masks in ((1.0, "liver.", 1), (-1.0, "There is no liver in this image.", 0)):
        torch.nn.init.constant_(network.head.bias, bias)
        by_target = {p.id.partition("#")[2]: p for p in unet.predict(network, canvas, items)}
        assert by_target["liver"].answer == answers
        assert [(mask["size"], len(mask["counts"])) for mask in by_target["liver"].masks] == [([24, 32], 4)] * masks


def test_a_failure_leaves_nothing(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unet, "learning_rate", lambda spent: math.nan)
    assert unet.main(arguments(recipe_file, tmp_path / "out", "--steps", "5")) == 1
    assert "the loss of step 2 is nan" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "expected one of them, above 0"),
        (["--steps", "1", "--minutes", "1"], "expected one of them, above 0"),
        (["--minutes", "-1"], "expected one of them, above 0"),
        (["--steps", "3", "--data", "."], "--benchmark and --data go together"),
        (["--steps", "3", "--output", "."], "is not empty"),
    ],
)
def test_bad_options_are_named(recipe_file: Path, tmp_path: Path, capsys: Any, more: list[str], message: str) -> None:
    assert unet.main(arguments(recipe_file, tmp_path / "out", *more)) == 1
    assert message in capsys.readouterr().err


def test_an_unknown_target_is_refused_before_training(
    recipe_file: Path, benchmark: Path, drawn_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    read = unet.read_cases

    def with_spleen(*given: Any) -> Any:
        items, shards = read(*given)
        return [dataclasses.replace(items[0], target="spleen"), *items[1:]], shards

    monkeypatch.setattr(unet, "read_cases", with_spleen)
    more = ["--steps", "3", "--benchmark", str(benchmark), "--data", str(drawn_data)]
    assert unet.main(arguments(recipe_file, tmp_path / "out", *more)) == 1
    assert "target 'spleen' is none of the 4 classes" in capsys.readouterr().err
