"""What a recipe takes, before anything is trained: `medsight train CONFIG --plan`.

Models are built without weights, so neither the model's folder nor the data need be there. A device holds, in bytes:

    weights      all parameters and buffers, in `model.dtype`; QLoRA's linear layers in 4 bits with their scales
    gradients    those of the parameters that train, in their own dtype
    optimizer    AdamW two numbers, Muon one, for each of these parameters, in their dtype; see `memory.STATES`
    activations  the most that lives besides, in the forward and backward pass of one micro-batch

The first three are exact. Activations are an estimate: the passes of a stage run on tensors without content, in the
recipe's precision, with its gradient checkpointing, and the bytes alive are added up. A conversation has one image,
`max_length` tokens (the image and `memory.WORDS` more where that is not set) and cites `max_regions` codes. Counted:
what autograd keeps, parameters cast for mixed precision, logits, temporaries. Not counted: mask losses, workspaces of
kernels and the CUDA context, fragmentation, validation.

    a device     their sum; with several devices DDP's buckets too, which are as large as the gradients
    sharded      FSDP2: the first three over all devices, the activations without casts, and what is gathered
                 at a time in the computing dtype: all but the language model's layers, and two of these
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from configuration_medsight.configuration_medsight import MedSightConfig
from configuration_medsight.presets_medsight import PRESETS
from modeling_medsight.modeling_medsight import MedSightForConditionalGeneration

from .corpus import Corpus, conversation_rows, corpus_conversations, read_corpus
from .fresh_model import fresh_config
from .memory import FOUR_BITS, activation_bytes, gathered_numbers, optimizer_bytes
from .recipe import AnnotationSettings, Recipe
from .run import DEFAULTS_SFT, STAGES, arguments_class, hold_out_text, refuse_missing_regions, stage_settings
from .stage import Stage, StageSettings
from .stage_3b_text_to_vision import TextToVisionStage, vocabularies


UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


@dataclass
class StagePlan:
    """One stage: counts, and bytes a device.

    Attributes:
        name: folder of the stage.
        trained, parameters: parameters that train, and all.
        steps: optimizer steps; None where the data must be there to know.
        batch: samples a device and micro-batch, micro-batches a step, devices.
        weights, gradients, optimizer, activations: bytes; `optimizer` None for one that is not known.
        sharded: bytes a device if sharded over all; None where parameters may not be sharded.
    """

    name: str
    trained: int
    parameters: int
    steps: int | None
    batch: tuple[int, int, int]
    weights: int
    gradients: int
    optimizer: int | None
    activations: int
    sharded: int | None

    @property
    def whole(self) -> int:
        """Bytes a device without sharding."""
        buckets = self.gradients if self.batch[2] > 1 else 0
        return self.weights + self.gradients + buckets + (self.optimizer or 0) + self.activations


def plan(recipe: Recipe, devices: int | None = None) -> str:
    """A table of all stages: parameters, steps, batch, memory a device.

    Args:
        devices: how many the run is for; WORLD_SIZE by default, or 1.

    Raises:
        OSError: the model's folder is not there, and no preset says what it will be like.
        ValueError: a setting is bad.
    """
    devices = devices if devices is not None else int(os.environ.get("WORLD_SIZE", "1"))
    if devices < 1:
        raise ValueError(f"--devices {devices}: expected at least 1")
    stages, notes = stage_plans(recipe, devices)
    return "\n".join([*table(stages, devices), *notes])


def stage_plans(recipe: Recipe, devices: int) -> tuple[list[StagePlan], list[str]]:
    """The plan of each stage, and what to say besides."""
    settings = stage_settings(recipe)
    corpus, notes = corpus_if_needed(recipe, settings)
    config, source = planned_config(recipe, corpus)
    stages = []
    for key, (own, passed) in settings.items():
        rows = None
        if passed.get("max_steps", -1) <= 0:
            rows, missing = count_rows(key, own, recipe, corpus)
            notes += [note for note in missing if note not in notes]
        stages.append(stage_plan(key, own, passed, recipe, config, rows, devices))
    return stages, [source, *notes]


def stage_plan(
    key: str,
    own: StageSettings,
    passed: dict[str, Any],
    recipe: Recipe,
    config: MedSightConfig,
    rows: int | None,
    devices: int,
) -> StagePlan:
    """Build the model of a stage on the meta device, let the stage choose what trains, and count."""
    places: Any = SimpleNamespace(config=config, processor=None)
    stage = STAGES[key](own, places, recipe.seed)
    dtype, autocast = getattr(torch, recipe.model.dtype), mixed_precision(own, passed)
    with torch.device("meta"):
        model = MedSightForConditionalGeneration(config).to(dtype)
        # PEFT changes these modules, so they are looked up before.
        linear = [m.weight for m in model.model.language_model.modules() if isinstance(m, nn.Linear)]
        four_bits = {id(weight) for weight in linear} if getattr(own, "method", "full") == "qlora" else set()
        prepared = stage.prepare(model)
    tensors = [*prepared.parameters(), *prepared.buffers()]
    trained = [parameter for parameter in prepared.parameters() if parameter.requires_grad]
    weights = sum(math.ceil(t.numel() * FOUR_BITS) if id(t) in four_bits else t.nbytes for t in tensors)
    gradients = sum(parameter.nbytes for parameter in trained)
    setting = setting_of(own, passed)
    optimizer = optimizer_bytes(prepared, own.muon_learning_rate, str(setting("optim")))
    computing = autocast or dtype
    gathered = gathered_numbers(model) * computing.itemsize
    counts = {
        "trained": sum(parameter.numel() for parameter in trained) - words_that_stay(stage, model),
        "parameters": sum(parameter.numel() for parameter in prepared.parameters()),
    }
    activations, without_casts = activation_bytes(
        stage,
        model,
        setting("per_device_train_batch_size"),
        codes=max(
            (entry.max_regions for entry in recipe.annotations.values()), default=AnnotationSettings.max_regions
        ),
        autocast=autocast,
        checkpointing=bool(setting("gradient_checkpointing") or setting("activation_checkpointing")),
        compute_dtypes=dict.fromkeys(four_bits, computing),
    )
    sharded = math.ceil((weights + gradients + (optimizer or 0)) / devices) + without_casts + gathered
    batch = (setting("per_device_train_batch_size"), setting("gradient_accumulation_steps"), devices)
    return StagePlan(
        name=stage.folder,
        **counts,
        steps=count_steps(setting("max_steps"), setting("num_train_epochs"), rows, math.prod(batch)),
        batch=batch,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        sharded=sharded if stage.shardable else None,
    )


def setting_of(own: StageSettings, passed: dict[str, Any]) -> Any:
    """A function: the value of a field of `TrainingArguments`, as set or by default; None for one that it lacks."""
    defaults = {entry.name: entry.default for entry in dataclasses.fields(arguments_class(own.trainer))}
    defaults |= DEFAULTS_SFT if own.trainer == "sft" else {}
    return lambda name: passed.get(name, defaults.get(name))


def mixed_precision(own: StageSettings, passed: dict[str, Any]) -> torch.dtype | None:
    setting = setting_of(own, passed)
    return torch.bfloat16 if setting("bf16") else torch.float16 if setting("fp16") else None


def words_that_stay(stage: Stage, model: nn.Module) -> int:
    """Numbers of the vocabulary that have a gradient and yet do not train: in stage 3b, all rows but the codes'."""
    if not isinstance(stage, TextToVisionStage):
        return 0
    return sum((len(table) - stage.config.num_region_codes) * table.shape[1] for table in vocabularies(model))


def count_steps(max_steps: int, epochs: float, rows: int | None, batch: int) -> int | None:
    """Optimizer steps; an epoch ends with a whole one."""
    if max_steps > 0:
        return int(max_steps)
    return None if rows is None else math.ceil(epochs * math.ceil(rows / batch))


def corpus_if_needed(
    recipe: Recipe, settings: dict[str, tuple[StageSettings, dict[str, Any]]]
) -> tuple[Corpus | None, list[str]]:
    """The region rows, where steps or a fresh model's shape follow from them; or why they could not be read."""
    counted = any(passed.get("max_steps", -1) <= 0 for _, passed in settings.values())
    shaped = recipe.model.folder is None and None in (recipe.data.groups, recipe.data.classes)
    if not counted and not shaped:
        return None, []
    try:
        refuse_missing_regions(recipe, settings)
        return read_corpus(recipe), []
    except (OSError, ValueError) as error:
        return None, [f"Without the data: {error}."]


def count_rows(key: str, own: StageSettings, recipe: Recipe, corpus: Corpus | None) -> tuple[int | None, list[str]]:
    """Training samples of a stage; None, and why, where its data are not there."""
    if corpus is None:
        return None, []
    if key == "language_model":
        return len(hold_out_text(corpus_conversations(corpus), recipe, "training")), []
    if STAGES[key].reads == "regions":
        rows = corpus.training
        return sum(
            bool(targets or absent) for targets, absent in zip(rows["targets"], rows["absent"], strict=True)
        ), []
    annotated = [recipe.annotations[name] for name in own.data if name in recipe.annotations]
    others = [name for name in own.data if name not in recipe.annotations]
    count = sum(settings.per_image for settings in annotated) * len(corpus.training)
    try:
        return count + (len(conversation_rows(corpus, others, Path(recipe.output), "training")) if others else 0), []
    except OSError as error:
        return None, [f"Without the data: {error}."]


def planned_config(recipe: Recipe, corpus: Corpus | None) -> tuple[MedSightConfig, str]:
    """The configuration that a run would have, and where it is from.

    Raises:
        OSError: the model's folder is not there, and no preset is named.
        ValueError: the preset is unknown, or settings contradict each other.
    """
    settings = recipe.model
    if settings.folder is not None and Path(settings.folder).is_dir():
        config = MedSightConfig.from_pretrained(settings.folder, local_files_only=True, **settings.config)
        config.refuse_contradictions()
        return config, f"Model: {settings.folder}."
    if settings.preset is None:
        raise FileNotFoundError(
            f"model.folder={settings.folder} does not exist: make it with `medsight init`, or plan without it by "
            f"naming a preset of its size, --set model.preset=NAME ({', '.join(sorted(PRESETS))})"
        )
    if settings.preset not in PRESETS:
        raise ValueError(f"model.preset={settings.preset!r}: choose one of {', '.join(sorted(PRESETS))}")
    if settings.folder is not None:
        config = MedSightConfig.from_preset(settings.preset, **settings.config)
        return config, f"Model: {settings.folder} is not there yet; planned as the preset {settings.preset}."
    groups = corpus.groups.patterns if corpus else recipe.data.groups or {}
    classes = corpus.classes if corpus else recipe.data.classes or []
    return fresh_config(recipe, groups, classes), f"Model: the preset {settings.preset}, from nothing."


def table(stages: list[StagePlan], devices: int) -> list[str]:
    """The lines of the table, memory in one unit."""
    largest = max(stage.whole for stage in stages)
    unit, size = next(((name, bytes_) for name, bytes_ in UNITS if largest >= bytes_), UNITS[-1])

    def amount(count: int | None, unknown: str = "?") -> str:
        return unknown if count is None else f"{count / size:,.2f}"

    head = ["stage", "trained", "parameters", "steps", "batch", "weights", "gradients", "optimizer", "activations"]
    head += ["a device", "sharded"] if devices > 1 else ["a device"]
    lines = [head]
    for stage in stages:
        steps = "needs the data" if stage.steps is None else f"{stage.steps:,}"
        batch = f"{math.prod(stage.batch)} = {' x '.join(map(str, stage.batch))}"
        memory = (stage.weights, stage.gradients, stage.optimizer, stage.activations)
        whole = amount(stage.whole) if stage.optimizer is not None else f"> {amount(stage.whole)}"
        lines.append([stage.name, f"{stage.trained:,}", f"{stage.parameters:,}", steps, batch, *map(amount, memory)])
        lines[-1] += [whole, amount(stage.sharded, "never")] if devices > 1 else [whole]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rows = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return [*rows, "", f"Batch: a device's x micro-batches x devices. Memory: {unit} a device."]
