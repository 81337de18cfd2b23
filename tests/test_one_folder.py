"""One folder that loads anywhere, answers with text and masks, and saves again from there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def answer_as_stranger(source: Path, saved: Path, workplace: Path) -> list:
    """What a process without this package answers from `source`, after it saved everything again to `saved`."""
    script = Path(__file__).with_name("stranger.py")
    environment = {**os.environ, "HF_HOME": str(workplace / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, script, source, saved], cwd=workplace, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_stranger_loads_answers_saves_and_loads_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = answer_as_stranger(tiny_checkpoint, tmp_path / "saved", tmp_path)
    second = answer_as_stranger(tmp_path / "saved", tmp_path / "saved again", tmp_path)
    assert first == second
    names = {path.name for path in (tmp_path / "saved again").iterdir()}
    assert {"config.json", "model.safetensors", "modeling_medsight.py", "processing_medsight.py"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


@pytest.mark.parametrize("part", ["model", "processor"])
def test_saving_either_part_writes_all_of_the_code(tiny_checkpoint: Path, tmp_path: Path, part: str) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    auto_class = AutoModelForImageTextToText if part == "model" else AutoProcessor
    auto_class.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    written = {path.name: path.read_text("utf-8") for path in tmp_path.glob("*.py")}
    expected = {path.name for path in tiny_checkpoint.glob("*.py")}
    assert set(written) == expected and len(expected) > 8
    for name, text in written.items():
        assert "from configuration_medsight." not in text and "from processing_medsight." not in text, name


def test_a_large_model_is_sharded_and_loads(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert value.equal(again.state_dict()[name]), name
