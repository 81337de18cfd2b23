"""How long the steps of a recipe's stages take on this machine, measured on a few batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from medsight.loading import choose_device

from . import run_folder
from .canvas import Canvas
from .corpus import read_corpus
from .dataset import SampleDataset
from .recipe import Recipe
from .run import stage_dataset
from .settings import resolve_stages
from .stage import Stage, batch_to, evenly, trained_module


TIMED = 2  # batches, after one that warms up


@dataclass
class Measured:
    """What a probe found.

    Attributes:
        images: training images, replayed ones included.
        new_images: training images that are not replayed.
        steps: stage -> seconds a step.
        annotation: seconds that writing conversations about all images will take.
    """

    images: int = 0
    new_images: int = 0
    steps: dict[str, float] = field(default_factory=dict)
    annotation: float = 0.0


def probe(recipe: Recipe) -> Measured:
    """Time some batches of every stage, on the model that the recipe starts from; nothing is written.

    Stages on conversations are timed on empty ones, and on pictures read as for the first stage on regions.

    Raises:
        OSError, ValueError: as training on the recipe.
    """
    corpus = read_corpus(recipe)
    sets = corpus.training["dataset"]
    found = Measured(len(sets), sum(name not in corpus.replayed for name in sets))
    model, processor = run_folder.load_folder(Path(recipe.model.folder or ""), recipe)
    model.to(choose_device("auto"))
    canvas = Canvas(processor, model.config, corpus.groups, True, corpus.elsewhere, corpus.known)
    reading = 0.0  # seconds an image
    for name, resolved in resolve_stages(recipe).items():
        stage = resolved.kind(name, resolved.settings, canvas, recipe.seed)
        size = resolved.argument("per_device_train_batch_size") or 1
        module = trained_module(stage.prepare(model), stage).train()
        if stage.reads == "regions":
            dataset = stage_dataset(stage, recipe, corpus, "training")
            batch, seconds = timed(_batch, stage, dataset, evenly(len(dataset), size)[:size])
            reading = seconds / min(size, len(dataset))
        else:
            batch = stage.batch_of_zeros(size, 2)
        _, seconds = timed(_step, module, stage, batch_to(batch, model.device))
        found.steps[name] = (seconds + size * reading) * resolved.argument("gradient_accumulation_steps")
        if stage.reads == "regions":
            found.annotation = found.annotation or found.images * (seconds / size / 3 + reading)
    return found


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a function returns, and the mean of the seconds that it takes after a first call."""
    result = work(*arguments)
    began = perf_counter()
    for _ in range(TIMED):
        result = work(*arguments)
    return result, (perf_counter() - began) / TIMED


def _batch(stage: Stage, dataset: SampleDataset, draws: Sequence[int]) -> dict[str, Any]:
    batch = stage.collator()([dataset[draw] for draw in draws])
    return {key: value for key, value in batch.items() if key not in ("files", "skipped")}


def _step(module: Any, stage: Stage, batch: dict[str, Any]) -> None:
    module(**stage.before_forward(dict(batch), 1.0))["loss"].backward()
    module.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
