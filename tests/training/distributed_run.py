"""What one of several processes does: trains by a recipe. Run by torchrun.

torchrun --nproc_per_node 2 tests/training/distributed_run.py RECIPE.yaml [--leave]
With --leave every stage is left right after each of its checkpoints, as if killed, and entered anew from the disk.
RECIPE.pids gets the process' id; RECIPE.calls says which process annotates, seeks centres of codes and saves.
"""

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from medsight.training import run, run_folder, stage_codebook
from medsight.training.recipe import load_recipe
from medsight.training.trainer import StageTrainer


class LeftError(Exception):
    """The run is left."""


def train_and_leave(recipe: Path) -> None:
    """Train, leaving right after every checkpoint and going on from the disk."""
    save = StageTrainer._save_checkpoint

    def save_and_leave(self: Any, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        raise LeftError

    StageTrainer._save_checkpoint = save_and_leave
    while True:
        torch.manual_seed(12345)  # a run that goes on may not lean on what its process drew before
        try:
            run.train(load_recipe(recipe))
            return
        except LeftError:
            continue


def write_calls(module: Any, name: str, file: Path) -> None:
    """Have every call of a function of a module leave a line with the function's name and the process."""
    function: Callable[..., Any] = getattr(module, name)

    @wraps(function)
    def written(*args: Any, **kwargs: Any) -> Any:
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(f"{name} {PartialState().process_index}\n")
        return function(*args, **kwargs)

    setattr(module, name, written)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    with open(path.with_suffix(".pids"), "a", encoding="utf-8") as pids:
        pids.write(f"{os.getpid()}\n")
    for module, name in (
        (run, "annotate_regions"),
        (run_folder, "save_folder"),
        (run_folder, "write_text"),
        (stage_codebook, "kmeans"),
    ):
        write_calls(module, name, path.with_suffix(".calls"))
    if "--leave" in sys.argv[2:]:
        train_and_leave(path)
    else:
        run.train(load_recipe(path))
    PartialState().destroy_process_group()  # or its threads may be found running at the interpreter's end
