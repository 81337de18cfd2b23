"""One folder that loads anywhere, answers with text and masks, and saves again from there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from configuration_medsight import MedSightConfig


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("configuration_medsight", "modeling_medsight", "processing_medsight")


def answer_as_stranger(source: Path, saved: Path, workplace: Path) -> list:
    """What a process without this package answers from `source`, after it saved everything again to `saved`."""
    script = Path(__file__).with_name("stranger.py")
    environment = {**os.environ, "HF_HOME": str(workplace / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, script, source, saved], cwd=workplace, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def modules(*folders: Path) -> set[str]:
    return {path.name for folder in folders for path in folder.glob("*_medsight.py")}


def test_a_stranger_loads_answers_saves_and_loads_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = answer_as_stranger(tiny_checkpoint, tmp_path / "saved", tmp_path)
    second = answer_as_stranger(tmp_path / "saved", tmp_path / "saved again", tmp_path)
    assert first == second
    names = {path.name for path in (tmp_path / "saved again").iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    assert {name for name in names if name.endswith(".py")} == modules(*(ROOT / name for name in PACKAGES))
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


@pytest.mark.parametrize(
    ("loaded_by", "packages"),
    [(MedSightConfig, PACKAGES[:1]), (AutoModelForImageTextToText, PACKAGES[:2]), (AutoProcessor, PACKAGES[::2])],
    ids=["configuration", "model", "processor"],
)
def test_each_part_saves_the_code_of_its_package_and_of_those_below(
    tiny_checkpoint: Path, tmp_path: Path, loaded_by: type, packages: tuple[str, ...]
) -> None:
    loaded_by.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    assert modules(tmp_path) == modules(*(ROOT / name for name in packages))
    for path in tmp_path.glob("*.py"):
        assert path.read_bytes() == (tiny_checkpoint / path.name).read_bytes()
        assert not any(f"from {name}." in path.read_text("utf-8") for name in PACKAGES), path.name


def test_a_large_model_is_sharded_and_loads(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert value.equal(again.state_dict()[name]), name
