"""How fast is training, and how long does it wait for its data?"""

import tempfile
import time
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch

from medsight.training.recipe import load_recipe
from medsight.training.run import train
from medsight.training.trainer import StageTrainer

from .measuring import Row


def training(device: torch.device, recipe: str, stage: str, steps: int, overrides: Sequence[str] = ()) -> list[Row]:
    """One stage of a recipe, by itself, for `steps` steps, on the device that training takes.

    Rows: what, batch_size, step_s, images_per_s, waiting_share (share of the time spent waiting for data).
    """
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_recipe(recipe, [f"output={folder}/run", f"stages.{stage}.max_steps={steps}", *overrides])
        loaded.stages = [entry for entry in loaded.stages if entry["name"] == stage]
        return [time_run(loaded, stage)]


def time_run(recipe: Any, stage: str) -> Row:
    """Trains one stage by a recipe, for the time that its steps take and the part of it that they wait for data."""
    fetch, waits, marks = StageTrainer.get_batch_samples, [], []

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = fetch(self, *args, **kwargs)
        waits.append(time.perf_counter() - start)
        marks.append((start, self.args.train_batch_size * self.args.gradient_accumulation_steps))
        return result

    with patch.object(StageTrainer, "get_batch_samples", timed):
        train(recipe, stage)
    # From the second step on: the first one opens files and starts workers.
    steps, batch_size = len(marks) - 2, marks[0][1]
    whole = marks[-1][0] - marks[1][0]
    return {
        "what": f"stage {stage}, by its recipe",
        "batch_size": batch_size,
        "step_s": whole / steps,
        "images_per_s": batch_size * steps / whole,
        "waiting_share": sum(waits[1:-1]) / whole,
    }
