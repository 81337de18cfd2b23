"""What a recipe takes, before anything is trained: `medsight train CONFIG --plan`.

Models are built without weights, so neither the model's folder nor the data need be there. docs/training.md says what
is counted. Activations are those of conversations with one image, `max_length` tokens (the image and
`stage_conversations.TOKENS` more where that is not set) and `max_regions` codes, and of images with as many masks.
A language model whose folder is not there yet is taken to be stored in bfloat16, as published ones are.
Sharded (FSDP2) are weights, gradients and optimizer states; to them come the activations of a model in the computing
dtype, and what is gathered at a time in it: all but the language model's layers, and two of these.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from configuration_medsight.configuration_medsight import PRESETS, MedSightConfig
from medsight.data.additions import extended_config
from medsight.data.groups import UnknownGroupError
from medsight.text import align
from modeling_medsight.modeling_medsight import MedSightForConditionalGeneration

from .corpus import Corpus, conversation_rows, read_corpus, refuse_unknown_targets
from .fresh_model import fresh_config
from .memory import FOUR_BITS, activation_bytes, gathered_numbers, optimizer_bytes
from .precision import hold_in_bfloat16, parts_in_float32
from .recipe import AnnotationSettings, Recipe
from .settings import ResolvedStage, refuse_missing_regions, resolve_stages
from .stage import Stage


UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


@dataclass
class StagePlan:
    """One stage: counts, and bytes a device.

    Attributes:
        name: the recipe's.
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


def stage_plans(recipe: Recipe, devices: int) -> tuple[list[StagePlan], list[str]]:
    """The plan of each stage on so many devices, and what to say besides.

    Raises:
        OSError: the model's folder is not there, and no preset says what it will be like.
        ValueError: a setting is bad, or a mask shows a structure that the model does not know.
    """
    resolved = resolve_stages(recipe)
    corpus, notes = corpus_if_needed(recipe, resolved)
    config, said = planned_config(recipe, corpus)
    if corpus is not None and any(stage.kind.reads == "regions" for stage in resolved.values()):
        refuse_unknown_targets(corpus, config)
    stages = []
    folder = None if recipe.model.folder is None else Path(recipe.model.folder)
    known = folder if folder is not None and any(folder.glob("model*.safetensors*")) else None
    stored = folder is not None  # the language model as the folder has it: no stage has trained it yet
    for stage in resolved.values():
        stored = stored and "language_model" not in stage.settings.trains
        in_float32 = parts_in_float32(recipe.model, stage.settings.trains, known) if stored else None
        rows = None
        if stage.argument("max_steps") <= 0:
            rows, missing = count_rows(stage, recipe, corpus)
            notes += [note for note in missing if note not in notes]
        stages.append(stage_plan(stage, recipe, config, rows, devices, in_float32))
    return stages, [*said, *notes]


def stage_plan(
    resolved: ResolvedStage,
    recipe: Recipe,
    config: MedSightConfig,
    rows: int | None,
    devices: int,
    in_float32: Collection[str] | None,
) -> StagePlan:
    """Build the model of a stage on the meta device, let the stage choose what trains, and count.

    Args:
        in_float32: see `parts_in_float32`.
    """
    canvas: Any = SimpleNamespace(config=config, processor=None)
    stage = resolved.kind(resolved.name, resolved.settings, canvas, recipe.seed)
    dtype, autocast = getattr(torch, recipe.model.dtype), None
    if resolved.argument("bf16") or resolved.argument("fp16"):
        autocast = torch.bfloat16 if resolved.argument("bf16") else torch.float16
    model, prepared, four_bits = model_on_meta(stage, config, dtype, in_float32)
    tensors = [*prepared.parameters(), *prepared.buffers()]
    trained = [parameter for parameter in prepared.parameters() if parameter.requires_grad]
    weights = sum(math.ceil(t.numel() * FOUR_BITS) if id(t) in four_bits else t.nbytes for t in tensors)
    gradients = sum(parameter.nbytes for parameter in trained)
    optimizer = optimizer_bytes(prepared, stage.settings.muon_learning_rate, str(resolved.argument("optim")))
    size, micro_batches = map(resolved.argument, ("per_device_train_batch_size", "gradient_accumulation_steps"))
    computing = autocast or dtype
    gathered = gathered_numbers(model) * computing.itemsize
    most = max((entry.max_regions for entry in recipe.annotations.values()), default=AnnotationSettings.max_regions)
    checkpointing = any(map(resolved.argument, ("gradient_checkpointing", "activation_checkpointing")))
    passing: dict[str, Any] = {"regions": most, "autocast": autocast, "checkpointing": checkpointing}
    activations = activation_bytes(stage, model, size, **passing, compute_dtypes=dict.fromkeys(four_bits, computing))
    sharded = None
    if devices > 1 and stage.shardable:
        in_shards = activations
        if computing != dtype or in_float32 is not None:
            model, _, _ = model_on_meta(stage, config, computing)
            in_shards = activation_bytes(stage, model, size, **passing)
        shards = weights if in_float32 is None else dtype.itemsize * sum(map(torch.numel, tensors))
        sharded = math.ceil((shards + gradients + (optimizer or 0)) / devices) + in_shards + gathered
    batch = (size, micro_batches, devices)
    steps = resolved.argument("max_steps")
    if steps <= 0:  # an epoch ends with a whole step
        epochs = resolved.argument("num_train_epochs")
        steps = None if rows is None else math.ceil(epochs * math.ceil(rows / math.prod(batch)))
    return StagePlan(
        name=stage.name,
        trained=sum(parameter.numel() for parameter in trained) - stage.idle(model),
        parameters=sum(parameter.numel() for parameter in prepared.parameters()),
        steps=steps,
        batch=batch,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        sharded=sharded,
    )


def model_on_meta(
    stage: Stage, config: MedSightConfig, dtype: torch.dtype, in_float32: Collection[str] | None = None
) -> tuple[MedSightForConditionalGeneration, nn.Module, set[int]]:
    """A model without weights, as the stage prepares it, and the ids of its weights that QLoRA holds in 4 bits."""
    with torch.device("meta"):
        model = MedSightForConditionalGeneration(config).to(dtype)
        if in_float32 is not None:
            hold_in_bfloat16(model, in_float32)
        # PEFT changes these modules, so they are looked up before.
        linear = [m.weight for m in model.model.language_model.modules() if isinstance(m, nn.Linear)]
        in_four_bits = getattr(stage.settings, "method", "full") == "qlora"
        return model, stage.prepare(model), {id(weight) for weight in linear} if in_four_bits else set()


def corpus_if_needed(recipe: Recipe, stages: dict[str, ResolvedStage]) -> tuple[Corpus | None, list[str]]:
    """The region rows, where steps or a fresh model's shape follow from them, or a stage trains on them; or why they
    could not be read."""
    counted = any(stage.argument("max_steps") <= 0 for stage in stages.values())
    shaped = recipe.model.folder is None and None in (recipe.data.groups, recipe.data.classes)
    named = recipe.data.regions and any(stage.kind.reads == "regions" for stage in stages.values())
    if not counted and not shaped and not named and not recipe.model.extend:
        return None, []
    try:
        refuse_missing_regions(recipe, stages.values())
        return read_corpus(recipe), []
    except UnknownGroupError:
        raise
    except (OSError, ValueError) as error:
        return None, [f"Without the data: {error}."]


def count_rows(stage: ResolvedStage, recipe: Recipe, corpus: Corpus | None) -> tuple[int | None, list[str]]:
    """Training samples of a stage; None, and why, where its data are not there."""
    if corpus is None:
        return None, []
    if stage.kind.reads == "regions":
        rows = corpus.training
        shown = zip(rows["targets"], rows["absent"], strict=True)
        return sum(bool(targets or absent) for targets, absent in shown), []
    annotated = recipe.annotations.keys() & {*stage.settings.data}
    count = sum(recipe.annotations[name].per_image for name in annotated) * len(corpus.training)
    others = [name for name in stage.settings.data if name not in annotated]
    try:
        return count + (len(conversation_rows(corpus, others, Path(recipe.output), "training")) if others else 0), []
    except OSError as error:
        return None, [f"Without the data: {error}."]


def planned_config(recipe: Recipe, corpus: Corpus | None) -> tuple[MedSightConfig, list[str]]:
    """The configuration that a run would have, where it is from, and what would be added to it.

    Raises:
        OSError: the model's folder is not there, and no preset is named.
        ValueError: the preset is unknown, or settings contradict each other.
    """
    settings = recipe.model
    if settings.folder is not None and Path(settings.folder).is_dir():
        config = MedSightConfig.from_pretrained(settings.folder, local_files_only=True)
        added = corpus.additions.describe(config) if corpus else []
        if corpus and corpus.additions:
            config = extended_config(config, corpus.additions)
        for name, value in settings.config.items():
            setattr(config, name, value)
        config.refuse_contradictions()
        return config, [f"Model: {settings.folder}.", *(f"To be added: {line}." for line in added)]
    presets = ", ".join(sorted(PRESETS))
    if settings.preset is None:
        raise FileNotFoundError(
            f"model.folder={settings.folder} does not exist: make it with `medsight init`, or plan without it by "
            f"naming a preset of its size, --set model.preset=NAME ({presets})"
        )
    if settings.preset not in PRESETS:
        raise ValueError(f"model.preset={settings.preset!r}: choose one of {presets}")
    if settings.folder is not None:
        said = f"Model: {settings.folder} is not there yet; planned as the preset {settings.preset}."
        return MedSightConfig.from_preset(settings.preset, **settings.config), [said]
    groups = corpus.groups.patterns if corpus else recipe.data.groups or {}
    classes = corpus.classes if corpus else recipe.data.classes or []
    return fresh_config(recipe, groups, classes), [f"Model: the preset {settings.preset}, from scratch."]


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
    note = f"Batch: a device's x micro-batches x devices. Memory: {unit} a device."
    return [*align(lines).splitlines(), "", note]
