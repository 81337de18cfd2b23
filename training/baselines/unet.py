"""A plain target-conditioned U-Net, trained on a recipe's own rows: what a model of that recipe has to be ahead of.

python -m medsight.training.baselines.unet nano --minutes 45 --threads 2 --output runs/unet \\
    --benchmark segmentation --data ../shared/data/segmentation
medsight evaluate --benchmark segmentation --data ../shared/data/segmentation \\
    --predictions runs/unet/predictions.jsonl --output scores/unet --name U-Net

It is told a picture and one mask class, and gives that class's mask. Rows, validation split, canvas and augmentation
are those of the recipe's first stage on regions. A target that is no class of the training rows is taken for all
classes whose names end with it ("tumor": "liver tumor", "kidney tumor"), their masks united; where no pixel reaches a
probability of 0.5, it gives no mask.

OUTPUT/summary.json, predictions.jsonl      written together, when all is done
"""

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from medsight.evaluation.benchmarks import load_benchmark
from medsight.evaluation.cases import Case
from medsight.evaluation.predictions import Prediction, append_predictions, encode_mask
from medsight.evaluation.readers import read_cases
from medsight.files import check_empty, staged_folder, write_json
from medsight.text import note
from modeling_medsight.loss_medsight import mask_bce, mask_dice
from processing_medsight.image_processing_medsight import MedSightImageProcessor

from ..canvas import Canvas
from ..corpus import Corpus, read_corpus
from ..dataset import SampleDataset, Skipped
from ..held_out import figures, held_out_items, score_predictions, set_dice
from ..recipe import Recipe, load_recipe
from ..run import stage_dataset
from ..sampler import DrawSampler, rarity_weights
from ..settings import resolve_stages
from ..stage_regions import RegionSettings, RegionStage


WIDTHS = (16, 32, 64, 128, 128)
BATCH_SIZE = 8
LEARNING_RATE, WARMUP, LEAST = 2e-3, 0.02, 0.01  # peak; share of the budget; share of the peak that is left at the end
VALIDATIONS = 4
THRESHOLD = 0.5
SUMMARY, PREDICTIONS = "summary.json", "predictions.jsonl"


class Block(nn.Module):
    """Two 3x3 convolutions; the class scales and shifts the channels of the second."""

    def __init__(self, channels: int, width: int, condition: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.first_norm, self.second_norm = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.modulation = nn.Linear(condition, 2 * width)

    def forward(self, features: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        features = F.relu(self.first_norm(self.first(features)))
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        return F.relu(self.second_norm(self.second(features)) * (1 + scale) + shift)


class UNet(nn.Module):
    """A U-Net whose every block is conditioned on a mask class.

    Args:
        num_classes: mask classes.
        widths: channels of each level, each of half the side of the one before; multiples of 8.
        condition: width of a class's embedding.

    Example:

    ```python
    >>> import torch
    >>> from medsight.training.baselines.unet import UNet
    >>> UNet(num_classes=5, widths=(8, 16))(torch.zeros(2, 3, 32, 32), torch.tensor([0, 4])).shape
    torch.Size([2, 32, 32])

    ```
    """

    def __init__(self, num_classes: int, widths: Sequence[int] = WIDTHS, condition: int = 64) -> None:
        super().__init__()
        self.classes = nn.Embedding(num_classes, condition)
        inputs = (3, *widths[:-1])
        self.down = nn.ModuleList(Block(*pair, condition) for pair in zip(inputs, widths, strict=True))
        levels = reversed(list(itertools.pairwise(widths)))
        self.up = nn.ModuleList(Block(width + below, width, condition) for width, below in levels)
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, pixel_values: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Mask logits (n, S, S) of class i (n,) in picture i (n, 3, S, S)."""
        condition, features = self.classes(classes), pixel_values
        levels: list[torch.Tensor] = []
        for block in self.down:
            features = block(F.max_pool2d(features, 2) if levels else features, condition)
            levels.append(features)
        for block, level in zip(self.up, reversed(levels[:-1]), strict=True):
            features = F.interpolate(features, size=level.shape[-2:], mode="bilinear")
            features = block(torch.cat((features, level), dim=1), condition)
        return self.head(features)[:, 0]


def learning_rate(spent: float) -> float:
    """A short warm-up, then half a cosine, by the share of the budget that is spent."""
    cosine = LEAST + (1 - LEAST) * (1 + math.cos(math.pi * min(spent, 1.0))) / 2
    return LEARNING_RATE * min(1.0, (spent + 1e-3) / WARMUP) * cosine


def region_settings(recipe: Recipe) -> RegionSettings:
    """Those of the recipe's first stage on regions."""
    found = (stage.settings for stage in resolve_stages(recipe).values() if stage.kind is RegionStage)
    return next(found, RegionSettings())


def region_dataset(recipe: Recipe, corpus: Corpus, size: int) -> SampleDataset:
    """The training samples of that stage, on a canvas of `size` pixels, with masks of that size."""
    look = {name: getattr(recipe.model, name) for name in ("fit", "image_mean", "image_std")}
    image_processor = MedSightImageProcessor(size={"height": size, "width": size}, **look)
    processor = SimpleNamespace(image_processor=image_processor)
    names = {"mask_class_names": corpus.classes, "num_mask_classes": len(corpus.classes)}
    shape = SimpleNamespace(image_size=size, mask_size=(size, size), use_region_codebook=True, **names)
    canvas = Canvas(processor, shape, corpus.groups, recipe.data.keep_in_memory)
    stage = RegionStage("U-Net", region_settings(recipe), canvas, recipe.seed)
    return stage_dataset(stage, recipe, corpus, "training")


def batches(dataset: SampleDataset, power: float, seed: int, workers: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Without end: pictures (n, 3, S, S), a class asked of each (n,), and its masks (n, S, S), empty where absent.

    Args:
        power: rows with rare targets are drawn more often, see `rarity_weights`.
        workers: processes that prepare them; the same pictures whatever their number.
    """
    weights = rarity_weights(dataset.rows["dataset"], dataset.rows["targets"], power)
    sampler = DrawSampler(len(dataset), seed, weights, batch_size=BATCH_SIZE)
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = DataLoader(dataset, BATCH_SIZE, sampler=sampler, collate_fn=batch_of, **options)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from (batch for batch in loader if batch is not None)


def batch_of(samples: Sequence[Any]) -> tuple[torch.Tensor, ...] | None:
    """Samples with the class that each is asked for and the mask of that class; None of broken ones alone."""
    samples = [sample for sample in samples if not isinstance(sample, Skipped)]
    if not samples:
        return None
    asked = [sample["asked"][int(sample["chance"] * len(sample["asked"]))] for sample in samples]
    masks = [
        sample["mask_labels"][sample["class_labels"] == wanted].sum(0).clamp(max=1)
        for sample, wanted in zip(samples, asked, strict=True)
    ]
    return torch.stack([sample["pixel_values"] for sample in samples]), torch.stack(asked), torch.stack(masks)


def classes_asked(target: str | None, names: Sequence[str], item: str) -> list[int]:
    """The class of a target, or all classes whose names end with it.

    Raises:
        ValueError: there is none; the message names `item`.
    """
    found = [names.index(target)] if target in names else [i for i, n in enumerate(names) if n.endswith(f" {target}")]
    if not found:
        raise ValueError(f"{item}: target {target!r} is none of the {len(names)} classes of the training rows")
    return found


@torch.inference_mode()
def predict(network: UNet, canvas: Canvas, items: Sequence[Case]) -> list[Prediction]:
    """A mask, at the picture's own size, for the target of each item; none where no pixel reaches `THRESHOLD`."""
    network.eval()
    device, names, predictions = next(network.parameters()).device, list(canvas.classes), []
    for item in items:
        pixels, (width, height) = canvas.load_image(item.images[0])
        asked = torch.tensor(classes_asked(item.target, names, item.id), device=device)
        logits = network(on_device(pixels.expand(len(asked), -1, -1, -1), device), asked).amax(0, keepdim=True)
        (masks,) = canvas.image_processor.post_process_masks([logits], [(height, width)], threshold=THRESHOLD)
        shown = [encode_mask(mask.cpu().numpy()) for mask in masks if mask.any()]
        answer = f"{item.target}." if shown else f"There is no {item.target} in this image."
        predictions.append(Prediction(item.id, answer, answer, shown, phrases=[item.target] * len(shown)))
    return predictions


def on_device(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pictures with their channels last, which halves the time of a CPU's convolutions."""
    return pixels.to(device).contiguous(memory_format=torch.channels_last)


def train(
    corpus: Corpus, recipe: Recipe, size: int, steps: int | None, minutes: float | None, workers: int = 0
) -> tuple[UNet, Canvas, dict[str, Any]]:
    """Train on the recipe's training rows, and score the validation rows `VALIDATIONS` times on the way.

    Args:
        size: pixels of the picture's side that the network sees.
        steps, minutes: how long; one of them, validation left out.
        workers: processes that prepare pictures.

    Returns:
        The network, its canvas, and what summary.json says.
    """
    torch.manual_seed(recipe.seed)
    dataset, validation = region_dataset(recipe, corpus, size), held_out_items(corpus, "segmentation")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = UNet(len(corpus.classes)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    drawn = batches(dataset, region_settings(recipe).rarity_power, recipe.seed, workers)
    done: dict[str, Any] = {"steps": 0, "images": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    spent, validations = 0.0, list[dict[str, Any]]()
    while spent < 1:
        clock, cpu_clock = time.perf_counter(), time.process_time()
        network.train()
        pixels, asked, masks = next(drawn)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spent)
        logits, masks = network(on_device(pixels, device), asked.to(device)), masks.to(device)
        loss = (mask_bce(logits, masks) + mask_dice(logits, masks)).mean()
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of step {done['steps'] + 1} is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        done["steps"] += 1
        done["images"] += len(pixels)
        done["seconds"] += time.perf_counter() - clock
        done["cpu_seconds"] += time.process_time() - cpu_clock
        spent = done["steps"] / steps if steps else done["seconds"] / 60 / (minutes or 1)
        if spent >= (len(validations) + 1) / VALIDATIONS:
            metrics = score_predictions(validation, predict(network, dataset.canvas, validation), "segmentation")
            validations.append({**done, **figures(metrics), "sets": set_dice(metrics)})
            print(f"validation: {validations[-1]}", flush=True)
    return network, dataset.canvas, {**done, "validation_rows": len(validation), "validation": validations}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="recipe (YAML file), or the name of a shipped one, such as nano")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--minutes", type=float, help="of training, validation left out")
    parser.add_argument("--steps", type=int, help="of training, in place of minutes")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare pictures (default: none)")
    parser.add_argument("--size", type=int, default=112, help="pixels of a picture's side (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation (default: %(default)s)")
    parser.add_argument("--benchmark", help="predict the rows of this benchmark, such as segmentation")
    parser.add_argument("--data", help="folder with the benchmark's rows")
    chosen = parser.parse_args(arguments)
    try:
        run(chosen)
    except (OSError, ValueError) as error:
        note(f"error: {error}")
        return 1
    return 0


def run(chosen: argparse.Namespace) -> None:
    """Train, predict the rows of a benchmark, and write both files of OUTPUT."""
    if (chosen.steps is None) == (chosen.minutes is None) or (chosen.steps or chosen.minutes) <= 0:
        raise ValueError(f"--steps {chosen.steps}, --minutes {chosen.minutes}: expected one of them, above 0")
    if (chosen.benchmark is None) != (chosen.data is None):
        raise ValueError("--benchmark and --data go together")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    recipe = load_recipe(chosen.recipe)
    corpus = read_corpus(recipe)  # the validation split stays the recipe's, whatever --seed
    asked = read_cases(load_benchmark(chosen.benchmark), chosen.data)[0] if chosen.benchmark else []
    for item in asked:
        classes_asked(item.target, corpus.classes, item.id)
    with staged_folder(chosen.output, False, check_empty) as folder:
        recipe = dataclasses.replace(recipe, seed=chosen.seed)
        network, canvas, summary = train(corpus, recipe, chosen.size, chosen.steps, chosen.minutes, chosen.workers)
        summary["parameters"] = sum(parameter.numel() for parameter in network.parameters())
        summary["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        summary |= {name: getattr(chosen, name) for name in ("recipe", "size", "seed", "minutes", "workers")}
        write_json(folder / SUMMARY, {**summary, "threads": torch.get_num_threads(), "batch_size": BATCH_SIZE})
        if asked:
            append_predictions(folder / PREDICTIONS, predict(network, canvas, asked))
    print(f"written to {chosen.output}/")


if __name__ == "__main__":
    sys.exit(main())
