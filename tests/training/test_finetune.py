"""`medsight finetune`: from a folder of masks to a model of one's own, or a clear no."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from configuration_medsight.configuration_medsight import MedSightConfig
from medsight.checkpoint import read_json
from medsight.data.sources import Source, find_source
from medsight.training import finetune_recipe
from medsight.training.finetune import finetune
from medsight.training.finetune_checks import problems_of
from medsight.training.recipe import load_recipe


SIZE = (32, 24)  # width, height


def draw_lab(
    root: Path, draw: Callable[[int], dict[str, np.ndarray]], images: int, patients: int = 99, tests: int = 0
) -> Source:
    """A lab's data: OCT images of the retina, of which the last `tests` are the split test; masks by `draw`."""
    rows, generator = [], np.random.default_rng(0)
    for number in range(images):
        split = "test" if number >= images - tests else "train"
        (root / "oct" / split).mkdir(parents=True, exist_ok=True)
        pixels, image = generator.integers(0, 60, SIZE[::-1], dtype=np.uint8), f"oct/{split}/{number}.png"
        about = {"image": image, "modality": "OCT", "site": "retina", "split": split, "group": f"p{number % patients}"}
        for target, mask in draw(number).items():
            pixels[mask] = 180
            path = f"oct/{split}/{number}_{target}.png"
            Image.fromarray(mask).save(root / path)
            rows.append({**about, "mask": path, "target": target})
        Image.fromarray(pixels).save(root / image)
    (root / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return Source("biomedparse", str(root))


def box(left: int, top: int = 4, width: int = 10, height: int = 10) -> np.ndarray:
    mask = np.zeros(SIZE[::-1], dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def zone(number: int) -> dict[str, np.ndarray]:
    return {"foveal avascular zone": box(2 + number % 10)}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return draw_lab(tmp_path_factory.mktemp("lab"), zone, images=16)


@pytest.fixture(scope="module")
def done(lab: Source, unbroken: Path, drawn_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fine-tuning with replayed data; read only."""
    output = tmp_path_factory.mktemp("finetune") / "run"
    replay = Source("biomedparse", str(drawn_data))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune_recipe, "LEAST_STEPS", dict.fromkeys(finetune_recipe.LEAST_STEPS, 10))
        finetune(lab, output, unbroken / "model", replay=replay, minutes=0.01, say=lambda line: None)
    return output


def test_a_folder_becomes_a_model_with_its_scores_and_a_report(done: Path, unbroken: Path) -> None:
    before, after = (MedSightConfig.from_pretrained(folder / "model") for folder in (unbroken, done))
    assert after.mask_class_names == [*before.mask_class_names, "foveal avascular zone"]
    assert after.group_names == [*before.group_names, "OCT retina"]
    meanings = read_json(done / "model" / "region_codes.json")
    new = {code for code, entry in meanings["codes"].items() if entry["group"] == "OCT retina"}
    assert new and all(code.startswith(f"[C{before.num_groups}_") for code in new)
    page = (done / "report.html").read_text(encoding="utf-8")
    assert "New test rows" in page and "Old test rows" in page and page.count("<polyline") == 4
    assert (done / "model" / "README.md").is_file()
    for when in ("before", "after"):
        for part, rows in (("new", 3), ("old", None)):
            count = read_json(done / when / part / "metrics.json")["scores"]["dice"]["micro"]["n"]
            assert count == (rows or count) and count > 0


def test_the_recipe_says_what_was_trained_on_what(done: Path) -> None:
    recipe = load_recipe(done / "finetune.yaml")
    assert [stage["name"] for stage in recipe.stages] == ["perceiver", "codebook", "text_to_vision", "unified"]
    assert recipe.stage("codebook")["groups"] == ["OCT retina"]
    (entry,), (old,) = recipe.data.regions, recipe.data.replay
    assert Source.from_mapping(entry) == find_source(done / "data.yaml") and entry["test_share"] == 0.2
    assert all(stage["replay_share"] == 0.5 for stage in recipe.stages if stage["kind"] != "codebook")
    assert old["layout"] == "biomedparse"


def test_it_is_done_once_and_goes_on_with_the_same_data_alone(
    done: Path, lab: Source, unbroken: Path, drawn_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(done, folder)
    weights = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    old = Source("biomedparse", str(drawn_data))
    begun = (folder / "finetune.yaml").read_text().replace(str(done), str(folder))
    (folder / "finetune.yaml").write_text(begun)
    with pytest.raises(ValueError, match="fine-tuning began with --replay"):
        finetune(lab, folder, unbroken / "model")
    with pytest.raises(ValueError, match="names other data than are asked for"):
        finetune(old, folder, unbroken / "model", replay=old)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    with pytest.raises(ValueError, match="not empty and holds no fine-tuning"):
        finetune(lab, tmp_path / "taken", unbroken / "model")
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == weights


def test_what_the_model_knows_already_is_trained_without_new_codes(
    drawn_data: Path, unbroken: Path, tmp_path: Path
) -> None:
    source = Source("biomedparse", str(drawn_data))
    found = finetune(
        *(source, tmp_path / "run", unbroken / "model"),
        minutes=0.01,
        plan_only=True,
        accept_problems=True,
        say=lambda line: None,
    )
    assert [stage["name"] for stage in load_recipe(found).stages] == ["perceiver", "unified"]
    assert not (tmp_path / "run" / "training").exists()


@pytest.mark.parametrize(
    ("draw", "images", "patients", "message"),
    [
        (zone, 9, 99, r"fewer than 10 training images show foveal avascular zone \(9\)"),
        (zone, 12, 1, "all 12 training images are of one patient"),
        (lambda number: {"zone": box(0, 0, *SIZE)}, 12, 99, "every mask fills its image: zone"),
        (lambda number: {"left lobe": box(20 * (number % 2))}, 12, 99, "'left lobe' lies on the left .* in 6 of 12"),
    ],
    ids=["few", "one patient", "full", "mirrored"],
)
def test_what_promises_nothing_is_said_before_training(
    draw: Any, images: int, patients: int, message: str, unbroken: Path, tmp_path: Path
) -> None:
    source = draw_lab(tmp_path / "lab", draw, images, patients)
    (problem,) = problems_of(source)
    assert re.search(message, problem)
    told: list[str] = []
    with pytest.raises(ValueError, match="1 problem.*--accept-problems"):
        finetune(source, tmp_path / "run", unbroken / "model", say=told.append)
    assert len(told) == 1 and not (tmp_path / "run" / "start").exists()


def test_sound_data_promise_something(lab: Source, tmp_path: Path) -> None:
    assert problems_of(lab) == []
    sided = draw_lab(tmp_path / "sided", lambda number: {"left lobe": box(20)}, 12)
    assert problems_of(sided) == []


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_at_twenty_moments_it_ends_in_the_same_model(
    done: Path, lab: Source, unbroken: Path, drawn_data: Path, tmp_path: Path
) -> None:
    output, chance = tmp_path / "run", random.Random(0)
    command = [sys.executable, "-m", "medsight.cli", "finetune", lab.path, "--output", str(output)]
    command += ["--model", str(unbroken / "model"), "--replay", str(drawn_data)]
    about: dict[str, Any] = {"text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}  # as the other run
    planned = subprocess.run([*command, "--minutes", "0.01", "--plan"], capture_output=True, check=False, **about)
    assert planned.returncode == 0, planned.stderr
    recipe = (done / "finetune.yaml").read_text().replace(str(done), str(output))
    (output / "finetune.yaml").write_text(recipe)
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **about)
        deadline = time.monotonic() + chance.uniform(4, 14)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = subprocess.run(command, capture_output=True, check=False, **about)
    assert last.returncode == 0, last.stderr
    expected, given = (load_file(run / "model" / "model.safetensors") for run in (done, output))
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())
