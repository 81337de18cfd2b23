"""`medsight train` killed with SIGKILL, again and again, gives what an unbroken run gives."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.training.tiny_run import STAGES, steps_of, tiny_values


def start(recipe: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "medsight.cli", "train", str(recipe)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_run_killed_in_every_stage_gives_the_losses_of_an_unbroken_one(
    drawn_data: Path, unbroken: Path, tmp_path: Path
) -> None:
    output, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_values(drawn_data, output)), encoding="utf-8")
    for stage in STAGES:
        folder = output / "stages" / stage
        process = start(recipe)
        # while it writes its first checkpoint, or just after
        while process.poll() is None and not [*folder.glob("checkpoint-*"), *folder.glob(".saving-*")]:
            time.sleep(0.005)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "finished.json").is_file()
    process = start(recipe)
    assert process.wait() == 0, process.stderr.read()
    for stage in STAGES:
        assert steps_of(output, stage) == steps_of(unbroken, stage)
    expected, given = (load_file(run / "model" / "model.safetensors") for run in (unbroken, output))
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())
