"""The folder of a run: what it says of the run, and what may be trained in it."""

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from medsight.processes import lock
from medsight.training.recipe import load_recipe
from medsight.training.run import train
from tests.training.tiny_run import only, steps_of, tiny_recipe


def test_a_folder_is_not_trained_in_twice_at_once(unbroken: Path, drawn_data: Path) -> None:
    with lock(unbroken, "training"), pytest.raises(ValueError, match="another process is training there"):
        train(tiny_recipe(drawn_data, unbroken))


def test_a_collective_may_take_as_long_as_the_most_patient_stage_says(
    drawn_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def join(cpu: bool, timeout: timedelta) -> None:
        raise InterruptedError(f"{cpu} {timeout.total_seconds():.0f}")

    monkeypatch.setattr("medsight.training.run.join_processes", join)
    for longest, stages in ((1800, {}), (7200, {"codebook": {"ddp_timeout": 7200}})):
        with pytest.raises(InterruptedError, match=f"True {longest}"):
            train(tiny_recipe(drawn_data, tmp_path / "run", stages=stages))


def test_stages_ahead_may_be_changed_and_those_behind_may_not(drawn_data: Path, tmp_path: Path) -> None:
    stages = only("perceiver", "vision_to_text")
    output = tmp_path / "run"
    train(tiny_recipe(drawn_data, output, stages=stages), "perceiver")
    changed = {**stages, "vision_to_text": {"max_steps": 2, "per_device_train_batch_size": 2}, "codebook": {}}
    train(tiny_recipe(drawn_data, output, stages=changed), "vision_to_text")
    assert len(steps_of(output, "vision_to_text")) == 2
    assert load_recipe(output / "recipe.yaml").stage("vision_to_text")["max_steps"] == 2
    for stage in ("perceiver", "vision_to_text"):
        with pytest.raises(ValueError, match=f"differs in stages.{stage}.max_steps: . -> 3"):
            train(
                tiny_recipe(drawn_data, output, stages={**changed, stage: {**changed.get(stage, {}), "max_steps": 3}})
            )
    train(tiny_recipe(drawn_data, output, stages={**changed, "codebook": None}), "vision_to_text")  # it is ahead
    without = {**changed, "vision_to_text": None}
    with pytest.raises(ValueError, match="differs in stages.vision_to_text"):
        train(tiny_recipe(drawn_data, output, stages=without))


def test_a_run_of_another_recipe_is_refused_with_the_difference(unbroken: Path, drawn_data: Path) -> None:
    changed = {"perceiver": {"learning_rate": 0.5}}
    with pytest.raises(ValueError, match=r"stages\.perceiver\.learning_rate: 0\.001 -> 0\.5"):
        train(tiny_recipe(drawn_data, unbroken, stages=changed))
    train(tiny_recipe(drawn_data, unbroken, training={"logging_steps": 7}))  # how it runs may change


def test_a_run_of_an_earlier_version_is_refused_by_name(unbroken: Path, drawn_data: Path, tmp_path: Path) -> None:
    run = shutil.copytree(unbroken, tmp_path / "run")
    old = yaml.safe_load((run / "recipe.yaml").read_text("utf-8"))
    old["stages"] = {entry.pop("name"): entry for entry in old["stages"]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(old), encoding="utf-8")
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(ValueError, match=f"{run} holds a run that an earlier version of medsight began, .* finish it"):
        train(tiny_recipe(drawn_data, run))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == files
    started = tiny_recipe(drawn_data, tmp_path / "new", model={"folder": str(run / "model")}, stages=only("perceiver"))
    train(started)  # its result can still be started from
    assert "Run 2 started from run 1" in json.loads((tmp_path / "new/training_record.json").read_text())["training"]


def test_the_settings_in_force_are_saved(unbroken: Path) -> None:
    content = json.loads((unbroken / "settings.json").read_text("utf-8"))
    assert content["settings"]["stages.unified.mask_share"]["value"] == 0.5
    assert content["settings"]["stages.perceiver.label_names"] == {"value": [], "source": "fixed"}
    assert content["topology"]["batches"]["perceiver"] == {"per_device": 3, "accumulation": 1, "global": 3}


def test_changed_data_are_refused(drawn_data: Path, unbroken: Path, tmp_path: Path) -> None:
    data = shutil.copytree(drawn_data, tmp_path / "data")
    run = shutil.copytree(unbroken, tmp_path / "run")
    (run / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(data, run).to_dict()), encoding="utf-8")
    lines = (data / "manifest.jsonl").read_text("utf-8").splitlines()
    (data / "manifest.jsonl").write_text("\n".join(lines[:-2]), encoding="utf-8")
    with pytest.raises(ValueError, match="the data have changed"):
        train(tiny_recipe(data, run))


def test_a_folder_with_other_things_is_not_touched(drawn_data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        train(tiny_recipe(drawn_data, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_step_may_be_cut_otherwise_but_not_be_of_another_size(unbroken: Path, drawn_data: Path) -> None:
    def cut(size: int, pieces: int) -> dict[str, Any]:
        return {"perceiver": {"per_device_train_batch_size": size, "gradient_accumulation_steps": pieces}}

    train(tiny_recipe(drawn_data, unbroken, stages=cut(1, 3)))
    with pytest.raises(ValueError, match=r"samples a step .* of perceiver: 3 -> 4"):
        train(tiny_recipe(drawn_data, unbroken, stages=cut(2, 2)))
    environment = unbroken / "environment.json"
    told = environment.read_text("utf-8")
    environment.write_text(told.replace('"processes": 1', '"processes": 2'), encoding="utf-8")
    mark = unbroken / "stages" / "perceiver" / "finished.json"
    try:
        train(tiny_recipe(drawn_data, unbroken))  # all is finished: no step is left to be of another size
        mark.rename(mark.with_suffix(".away"))
        with pytest.raises(ValueError, match=r"samples a step .* of perceiver: 6 -> 3"):
            train(tiny_recipe(drawn_data, unbroken))
    finally:
        environment.write_text(told, encoding="utf-8")
        if not mark.exists():
            mark.with_suffix(".away").rename(mark)


def test_a_finished_run_is_recognised(unbroken: Path, drawn_data: Path, capsys: pytest.CaptureFixture) -> None:
    def times() -> dict[Path, int]:
        files = [path for path in unbroken.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: path.stat().st_mtime_ns for path in files}

    train(tiny_recipe(drawn_data, unbroken))  # other tests may have had it written with another environment
    before = times()
    train(tiny_recipe(drawn_data, unbroken))
    assert "codebook is finished" in capsys.readouterr().out
    assert times() == before


def test_the_resolved_recipe_versions_and_data_are_saved(unbroken: Path, drawn_data: Path) -> None:
    recipe = yaml.safe_load((unbroken / "recipe.yaml").read_text("utf-8"))
    assert recipe["data"]["regions"][0]["path"] == str(drawn_data) and recipe["seed"] == 0
    assert json.loads((unbroken / "environment.json").read_text("utf-8"))["torch"] == torch.__version__
    data = json.loads((unbroken / "data.json").read_text("utf-8"))
    assert data["training"]["rows"] + data["validation"]["rows"] == 19
    assert len(data["training"]["sha256"]) == 64
