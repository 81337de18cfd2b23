"""What a stage is: which parameters it trains, on which batches, and how it is scored while it trains."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from .canvas import Canvas
from .collators import Collator
from .dataset import SampleDataset
from .recipe import refuse_unknown


# What a stage can train -> prefixes of the names of its parameters. The codes' rows are those of the vocabulary.
PARTS = {
    "image_encoder": ("model.vision_tower.",),
    "region_perceiver": ("model.region_perceiver.",),
    "codebook": ("model.codebook.", "model.group_classifier."),
    "vision_to_text": ("model.vision_to_text_projector.",),
    "text_to_vision": ("model.text_to_vision_projector.",),
    "language_model": ("model.language_model.", "lm_head."),
    "code_rows": ("model.language_model.embed_tokens.", "lm_head."),
}


BY_CLASS = ("class_queries", "class_predictor.weight", "class_predictor.bias")  # rows of these may be new


@dataclass
class StageSettings:
    """Settings of every stage, beside its `name`, its `kind`, and all fields of `TrainingArguments`.

    Attributes:
        trains: parts of the model (`PARTS`); all else is frozen.
        data: names of the conversations that it reads: keys of `annotations` or `data.conversations`, or `text` for
            the corpus' own words.
        trainer: `trainer`, or `sft` for TRL's SFTTrainer, which takes stages on conversations.
        muon_learning_rate: above 0, inner matrices and kernels take Muon at this rate.
        rarity_power: below 1, rows with rare targets are drawn more often (`rarity_weights`); with 1 every row comes
            once an epoch.
        replay_share: share of the draws that are of `data.replay`, where there is any; None draws its rows as others.
        keep_share: share of the weights that the stage began with in those that it ends with (weight interpolation,
            Wortsman et al., 2022). What is known by class, and so may be new, is as it was learnt.
        augment: move and recolour the training pictures.
        eval_batches: validation batches an evaluation, spread over all of the split; all by default.
        example_images: validation samples drawn as pictures at every evaluation.
    """

    trains: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    trainer: str = "trainer"
    muon_learning_rate: float = 0.0
    rarity_power: float = 1.0
    replay_share: float | None = None
    keep_share: float = 0.0
    augment: bool = True
    eval_batches: int | None = None
    example_images: int = 4


class Stage:
    """A stage of the progressive training. A kind of stages is a subclass, in a module of this package whose name
    begins with `stage_`: there [`stage_kinds`] finds it.

    Args:
        name: the recipe's name for it.
        settings: an instance of `Settings`.
        canvas: where pictures are placed, classes, groups, processor and config.
        seed: source of what the stage itself draws.

    Example:

    ```python
    >>> from medsight.training.stage import stage_kinds
    >>> sorted(stage_kinds())
    ['codebook', 'conversations', 'regions']

    ```
    """

    kind: ClassVar[str]
    reads: ClassVar[str]  # "regions" or "conversations"
    parts: ClassVar[tuple[str, ...]]  # what stages of this kind can train
    Settings: ClassVar[type[StageSettings]] = StageSettings
    rows_alone = False  # whether the codes' rows are all that trains of the vocabulary

    def __init__(self, name: str, settings: Any, canvas: Canvas, seed: int) -> None:
        self.name, self.settings, self.canvas, self.seed = name, settings, canvas, seed
        self.config, self.processor = canvas.config, canvas.processor
        self.began: dict[str, torch.Tensor] = {}  # what is trained, as it was before, where some of it is kept

    @classmethod
    def check(cls, settings: Any, arguments: dict[str, Any]) -> None:
        """Raise ValueError where settings, or fields of `TrainingArguments`, do not go together."""
        refuse_unknown(settings.trains, cls.parts, "trains")
        if not settings.trains:
            raise ValueError(f"trains is empty: name some of {', '.join(cls.parts)}")
        for name in ("keep_share", "replay_share"):
            if not 0 <= (getattr(settings, name) or 0) < 1:
                raise ValueError(f"{name}={getattr(settings, name)}: expected a share from 0 to below 1")
        if settings.trainer == "sft" and cls.reads != "conversations":
            raise ValueError("trainer=sft reads conversations only: set it to trainer")

    @property
    def shardable(self) -> bool:
        """Whether it can train on parameters that are divided over processes."""
        return not self.settings.keep_share

    def idle(self, model: nn.Module) -> int:
        """Numbers in trained parameters that have a gradient of zero all the time, as rows that are left as they are
        have."""
        return 0

    def dataset(self, rows: Any, training: bool, **common: Any) -> SampleDataset:
        """The samples of rows; `common` goes to `SampleDataset`."""
        raise NotImplementedError

    def collator(self) -> Collator:
        """What makes batches of the samples."""
        raise NotImplementedError

    def batch_of_zeros(self, size: int, regions: int) -> dict[str, Any]:
        """A training batch of `size` samples with the shapes that are usual and nothing in it, for a plan of memory.

        Args:
            regions: masks an image, or codes an answer.
        """
        raise NotImplementedError

    def prepare(self, model: nn.Module) -> nn.Module:
        """Freeze all that does not train; may wrap the model."""
        prefixes = tuple(prefix for part in self.settings.trains for prefix in PARTS[part])
        train_only(model, prefixes)
        if self.settings.keep_share:
            named = ((name, value) for name, value in model.state_dict().items() if value.is_floating_point())
            kept = {name: value for name, value in named if name.startswith(prefixes) and not name.endswith(BY_CLASS)}
            self.began = {name: value.clone() for name, value in kept.items()}
        return model

    def start(self, model: nn.Module, dataset: SampleDataset) -> None:
        """Before the first step of a run that does not resume."""

    def before_forward(self, batch: dict[str, Any], progress: float) -> dict[str, Any]:
        """A training batch as the model gets it; `progress` is the share of the steps that is done."""
        return batch

    def after_forward(self, outputs: Any) -> None:
        """After every forward pass in training."""

    def after_step(self, trainer: Any) -> None:
        """After every optimizer step."""

    def finish(self, model: nn.Module) -> nn.Module:
        """After the last step: the model to save."""
        values = model.state_dict() if self.began else {}
        for name, before in self.began.items():
            values[name].lerp_(before.to(values[name]), self.settings.keep_share)
        return model

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold besides weights, optimizer, schedule and random numbers."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""

    def score(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """Sums and counts of one validation batch."""
        raise NotImplementedError

    def summarise(self, totals: dict[str, torch.Tensor]) -> dict[str, float]:
        """Figures from the totals of `score` over the validation split."""
        raise NotImplementedError

    def example(self, model: nn.Module, sample: dict[str, Any]) -> tuple[list[torch.Tensor], list[str]]:
        """What the model makes of a validation sample: masks (H, W) boolean, at the mask size, and a label a mask."""
        raise NotImplementedError


@cache
def stage_kinds() -> dict[str, type[Stage]]:
    """The kinds of stages by name: those of all modules beside this one whose names begin with `stage_`."""
    names = [found.name for found in iter_modules([str(Path(__file__).parent)]) if found.name.startswith("stage_")]
    modules = [import_module(f".{name}", __package__) for name in names]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {kind.kind: kind for kind in classes if issubclass(kind, Stage) and kind is not Stage}


def trained_module(model: Any, stage: Stage) -> nn.Module:
    """The module that a stage trains, calls and scores, of a whole model: what sees, or all."""
    return model.region_model if stage.reads == "regions" else model


def group_places(config: Any, names: Sequence[str] | None, where: str) -> list[int]:
    """The places of code groups, all by default.

    Raises:
        ValueError: the model has no group of a name.
    """
    refuse_unknown(names or (), config.group_names, where)
    return [k for k, name in enumerate(config.group_names) if names is None or name in names]


def keep_rows(parameter: nn.Parameter, trained: torch.Tensor) -> RemovableHandle:
    """Zero the gradient of all rows but the `trained` ones, a boolean (rows,): with a fresh optimizer and no weight
    decay the others then stay as they are."""
    rows = trained.view(-1, *[1] * (parameter.ndim - 1))
    return parameter.register_hook(lambda gradient: gradient * rows.to(gradient.device))


def train_only(model: nn.Module, prefixes: Iterable[str]) -> None:
    """Freeze all parameters but those whose name starts with one of `prefixes`.

    Raises:
        ValueError: a prefix names no parameter.
    """
    prefixes = tuple(prefixes)
    named = list(model.named_parameters(remove_duplicate=False))  # a tied head counts under both its names
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name, _ in named):
            raise ValueError(f"no parameter of the model starts with {prefix!r}")
    trained = {id(parameter) for name, parameter in named if name.startswith(prefixes)}
    for _, parameter in named:
        parameter.requires_grad_(id(parameter) in trained)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The modules to keep out of training: those whose parameters are all frozen and what is in them, but for whole
    transformer layers.

    Such a layer holds no statistics and draws nothing itself, and only in training is it checkpointed, as it must be
    where gradients flow through it to something before it that trains. A module without parameters, such as a dropout,
    is as its parents are.
    """
    frozen: dict[int, nn.Module] = {}
    for module in model.modules():
        trains = [parameter.requires_grad for parameter in module.parameters()]
        if trains and not any(trains):
            frozen |= {id(inner): inner for inner in module.modules()}
    return [module for module in frozen.values() if not isinstance(module, GradientCheckpointingLayer)]


def dice(masks: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Dice of boolean masks, (n, H, W), (n, H, W) -> (n,); 1 where both are empty."""
    overlap = (masks & targets).flatten(1).sum(1).float()
    total = (masks.flatten(1).sum(1) + targets.flatten(1).sum(1)).float()
    return torch.where(total > 0, 2 * overlap / total.clamp(min=1), 1.0)


def ratio(totals: dict[str, torch.Tensor], above: str, below: str) -> float:
    """One total over another; NaN where nothing was counted."""
    count = float(totals[below])
    return float(totals[above]) / count if count else float("nan")


def batch_to(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    """A batch with its tensors, also those in lists, on a device."""
    return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, batch)


def evenly(size: int, count: int) -> range:
    """At least `count` places of `size`, or all, evenly."""
    return range(0, size, max(1, size // count))


def in_batches(
    dataset: SampleDataset, indices: Sequence[int], collator: Collator, size: int, device: Any
) -> Iterator[dict[str, Any]]:
    """Batches of chosen samples on a device, without their files' names; none where all of a batch are broken."""
    for start in range(0, len(indices), size):
        batch = collator([dataset[index] for index in indices[start : start + size]])
        batch.pop("skipped", 0)
        if batch.pop("files"):
            yield batch_to(batch, device)
