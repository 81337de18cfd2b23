"""What a run writes down for the card of its result: data and their licences, times, machines, carbon."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from medsight.files import write_json
from medsight.training.corpus import Corpus, read_corpus
from medsight.training.recipe import Recipe
from medsight.training.training_record import RECORD_FILE, write_record
from tests.training.tiny_run import draw_data, only, tiny_recipe


def finish(run: Path, stage: str, seconds: float, device: str) -> None:
    folder = run / "stages" / stage
    folder.mkdir(parents=True)
    finished = {"metrics": {"train_runtime": seconds}, "environment": {"device": device}}
    write_json(folder / "finished.json", finished)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A run whose first and last stages are finished, on drawn data with licences."""
    root = draw_data(tmp_path / "drawn")
    manifest = root / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text("utf-8").splitlines()]
    for row in rows:
        made = row["image"].startswith("totalsegmentator")
        row |= {"label_origin": "model (a network)" if made else "expert", "licence": "CC-BY-9.9", "tier": "B"}
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "environment.json", {"device": "Some GPU", "processes": 2, "torch": "2.13.0"})
    for stage, seconds in (("perceiver", 3600), ("codebook", 1830)):
        finish(run, stage, seconds, "Some GPU")
    return tiny_recipe(root, run, stages=only("perceiver", "codebook"))


def record_of(recipe: Recipe, corpus: Corpus | None = None) -> dict[str, Any]:
    write_record(Path(recipe.output), recipe, corpus or read_corpus(recipe))
    return json.loads((Path(recipe.output) / RECORD_FILE).read_text("utf-8"))


def test_data_licences_counts_and_time_are_written(recipe: Recipe, tmp_path: Path) -> None:
    record = record_of(recipe)
    assert list(record) == ["datasets", "emissions", "data", "training"] and record["emissions"] is None
    rows = {line.split(" ")[1]: line for line in record["data"].splitlines() if line.startswith("| ")}
    count = len(read_corpus(recipe).training)
    assert f"{count} training images" in record["data"]
    images = {name: int(rows[name].split("|")[2]) for name in ("busi", "sunnybrook", "totalsegmentator")}
    assert sum(images.values()) == count and record["datasets"] == sorted(images)
    assert "CC-BY-9.9, not verified at the source" in rows["busi"] and "Al-Dhabyani" in rows["busi"]
    assert "pseudo-labels" in rows["totalsegmentator"] and "pseudo" not in rows["busi"]
    assert f"{images['totalsegmentator']} images are **pseudo-labels**" in record["data"]
    for fact in ("from scratch", "Some GPU", "| perceiver | 1:00 |", "| together | 1:30 |", "`tiny`", "not measured"):
        assert fact in record["training"], fact
    assert str(tmp_path) not in json.dumps(record)
    before = (Path(recipe.output) / RECORD_FILE).stat().st_mtime_ns
    record_of(recipe)
    assert (Path(recipe.output) / RECORD_FILE).stat().st_mtime_ns == before


@pytest.mark.parametrize("version", ["now", "earlier"])
@pytest.mark.parametrize("left", ["model", "stages/perceiver/model"])
def test_a_run_from_another_run_tells_of_both(recipe: Recipe, tmp_path: Path, left: str, version: str) -> None:
    earlier = tmp_path / "earlier"
    (earlier / left).mkdir(parents=True)
    write_json(earlier / "environment.json", {"device": "Another GPU"})
    before = tiny_recipe(tmp_path / "drawn", earlier).to_dict()
    names = {"perceiver": "perceiver", "vision_to_text": "vision_to_text"}
    if version == "earlier":  # its stages had numbers, and were no list
        before["stages"] = {entry["name"]: entry for entry in before["stages"]}
        names = {"perceiver": "1_perceiver", "vision_to_text": "2_vision_to_text"}
        left = left.replace("perceiver", "1_perceiver")
        (earlier / left).mkdir(parents=True, exist_ok=True)
    (earlier / "recipe.yaml").write_text(yaml.safe_dump(before), encoding="utf-8")
    for stage, seconds in (("perceiver", 7200), ("vision_to_text", 600)):
        (earlier / "stages" / names[stage]).mkdir(parents=True, exist_ok=True)
        finished = {"metrics": {"train_runtime": seconds}, "environment": {"device": "A third GPU"}}
        write_json(earlier / "stages" / names[stage] / "finished.json", finished)
    corpus = read_corpus(recipe)
    recipe.model.folder = str(earlier / left)
    training = record_of(recipe, corpus)["training"]
    for fact in ("Run 1 started from scratch", "Another GPU", "Run 2 started from run 1", "Some GPU"):
        assert fact in training, fact
    whole = left == "model"  # a stage after the one that was started from counts no time
    assert (f"run 1: {names['vision_to_text']}" in training) == whole
    for row in (
        f"run 1: {names['perceiver']} | 2:00 | device A third GPU",
        "run 2: perceiver | 1:00 | device Some GPU",
        "run 2: codebook | 0:30 | device Some GPU",
        f"together | {'3:40' if whole else '3:30'} |",
    ):
        assert f"| {row} |" in training
    assert str(tmp_path) not in training


def test_carbon_is_what_codecarbon_recorded(recipe: Recipe) -> None:
    stages = Path(recipe.output) / "stages"
    for stage, kilograms in (("perceiver", 0.25), ("codebook", 1.0)):
        (stages / stage / "emissions.csv").write_text(f"timestamp,emissions\nnow,{kilograms}\n", encoding="utf-8")
    record = record_of(recipe)
    assert record["emissions"] == {"emissions": 1250.0, "source": "codecarbon", "training_type": "training"}
    assert "1,250.0 g of CO₂" in record["training"]
    (stages / "codebook" / "emissions.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"emissions\.csv is no record"):
        record_of(recipe)


def test_a_run_writes_it_whenever_a_stage_ends(unbroken: Path) -> None:
    record = json.loads((unbroken / RECORD_FILE).read_text("utf-8"))
    stages = [line.split()[1] for line in record["training"].splitlines() if line.startswith("| ")][1:-1]
    assert stages == [path["name"] for path in yaml.safe_load((unbroken / "recipe.yaml").read_text("utf-8"))["stages"]]
