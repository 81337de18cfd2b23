"""What the stages of a recipe run with: settings of their kind, fields of `TrainingArguments`, and where each value is
from.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from configuration_medsight.configuration_medsight import MedSightConfig
from medsight.data.sources import Source, find_layout
from medsight.text import align

from .augmentation import Augmentation
from .corpus import TEXT
from .recipe import Recipe, build, convert, leaves, refuse_unknown
from .stage import Stage, StageSettings, stage_kinds


DEFAULTS = {
    "eval_strategy": "epoch",
    "save_strategy": "steps",
    "save_steps": 200,
    "save_total_limit": 2,
    "logging_steps": 20,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.01},
    "report_to": "none",
    "dataloader_num_workers": 0,
}
FIXED = {
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    "label_names": [],
    "prediction_loss_only": True,
    "ddp_find_unused_parameters": False,
    "label_smoothing_factor": 0.0,  # the losses are the model's own
    "load_best_model_at_end": False,  # a stage goes on from its last step
    # a resumed run has the losses of an unbroken one, and a step is the same samples however it is cut
    "save_only_model": False,
    "ignore_data_skip": False,
    "auto_find_batch_size": False,
    "accelerator_config": None,  # `split_batches`, ...
    "resume_from_checkpoint": None,
    "average_tokens_across_devices": False,
}
SET_BY_RUN = ("output_dir", "seed", "data_seed", "train_sampling_strategy")
OPTIMIZERS = {"optim", "optim_args", "optim_target_modules"}
DEFAULTS_SFT = {"gradient_checkpointing": False, "bf16": False}  # TRL's own differ
# "nll" leaves the model's own forward pass in place, which knows of masks.
FIXED_SFT = {
    "max_length": None,
    "packing": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "loss_type": "nll",
}
ENTRY = ("name", "kind")  # of a stage, beside its settings


@dataclass(frozen=True)
class ResolvedStage:
    """A stage of a recipe, with what it runs with.

    Attributes:
        name: the recipe's.
        kind: class of the stage.
        settings: those of its kind.
        arguments: fields of `TrainingArguments` that are not transformers' defaults.
    """

    name: str
    kind: type[Stage]
    settings: Any
    arguments: dict[str, Any]

    def argument(self, name: str) -> Any:
        """A field of `TrainingArguments`, as set or by default; None for one that it lacks."""
        return self.all_arguments().get(name)

    def all_arguments(self) -> dict[str, Any]:
        """Every field of `TrainingArguments`, as set or by default."""
        defaults = {
            entry.name: entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
            for entry in dataclasses.fields(arguments_class(self.settings.trainer))
            if entry.init
        }
        ours, fixed = (DEFAULTS_SFT, FIXED | FIXED_SFT) if self.settings.trainer == "sft" else ({}, FIXED)
        return {**defaults, **ours, **self.arguments, **fixed}


def resolve_stages(recipe: Recipe) -> dict[str, ResolvedStage]:
    """The stages of a recipe by name, in its order.

    Raises:
        ValueError: an unknown kind or key, naming the nearest known one; or settings that do not go together.
    """
    if recipe.model.extend and recipe.model.folder is None:
        raise ValueError("model.extend=True: name the checkpoint to extend as model.folder")
    refuse_unknown(recipe.model.config, set(MedSightConfig.__annotations__), "model.config")
    if not recipe.stages:
        raise ValueError("the recipe has no stages: list some, each with a name and a kind")
    stages = {entry["name"]: _resolved(recipe, entry) for entry in recipe.stages}
    codebooks = [name for name, stage in stages.items() if "codebook" in stage.settings.trains]
    ahead = bool(codebooks)  # whether a codebook is still to be trained
    for name, stage in stages.items():
        known = [*recipe.annotations, *recipe.data.conversations, TEXT]
        refuse_unknown(stage.settings.data, known, f"stages.{name}: data")
        ahead = ahead and name != codebooks[-1]
        for read in stage.settings.data if ahead else ():
            if read in recipe.annotations and recipe.annotations[read].plain_share < 1:
                raise ValueError(
                    f"stages.{name}: the answers of {read} cite region codes, which stage {codebooks[-1]} learns "
                    "after it: name annotations of plain_share 1"
                )
    return stages


def _resolved(recipe: Recipe, entry: Mapping[str, Any]) -> ResolvedStage:
    where, values = f"stages.{entry['name']}", {key: value for key, value in entry.items() if key not in ENTRY}
    refuse_unknown([entry["kind"]], stage_kinds(), f"{where}: kind")
    kind = stage_kinds()[entry["kind"]]
    fields = [field.name for field in dataclasses.fields(kind.Settings)]
    arguments = {field.name: field for field in dataclasses.fields(arguments_class(values.get("trainer", "trainer")))}
    forced = {*SET_BY_RUN, *FIXED, *FIXED_SFT} - {*fields}
    for place, given in (("training", recipe.training), (where, values)):
        for name in forced & given.keys():
            raise ValueError(f"{place}: {name} is set by the run itself; leave it out")
        refuse_unknown(given, [*fields, *(name for name in arguments if name not in forced)], place)
    given = {**recipe.training, **values}
    chosen = {**DEFAULTS, **given}
    if "lr_scheduler_type" in given:  # the default arguments are the default schedule's
        chosen["lr_scheduler_kwargs"] = given.get("lr_scheduler_kwargs")
    for name, value in chosen.items():
        if value is False and name.endswith("_strategy"):
            chosen[name] = "no"  # which YAML reads as false
    settings: StageSettings = build(kind.Settings, {k: v for k, v in chosen.items() if k in fields}, where)
    try:
        kind.check(settings, chosen)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for name in OPTIMIZERS & given.keys() if settings.muon_learning_rate else ():
        raise ValueError(f"{where}: {name} has no use beside muon_learning_rate: leave one of them out")
    passed = {name: value for name, value in chosen.items() if name not in fields}
    taken = {name: convert(arguments[name].type, value, f"{where}: {name}") for name, value in passed.items()}
    return ResolvedStage(entry["name"], kind, settings, taken)


def arguments_class(trainer: str) -> type[TrainingArguments]:
    """`TrainingArguments`, or TRL's for its SFTTrainer."""
    if trainer == "trainer":
        return TrainingArguments
    if trainer != "sft":
        raise ValueError(f"trainer={trainer!r}: choose trainer or sft")
    from trl import SFTConfig

    return SFTConfig


def refuse_missing_regions(recipe: Recipe, stages: Iterable[ResolvedStage]) -> None:
    """Raise ValueError where there are no images with masks and something needs them, naming what does."""
    reading = [f"stage {stage.name}" for stage in stages if reads_regions(stage, recipe)]
    reading += ["model.extend"] if recipe.model.extend else []
    reading += [] if recipe.model.folder else [f"the preset {recipe.model.preset}"]
    if reading and not recipe.data.regions:
        raise ValueError(f"data.regions is empty, and images with masks are needed for {', '.join(reading)}")


def check_conversations(recipe: Recipe, stage: ResolvedStage) -> None:
    """Raise OSError or ValueError where the files of a source of conversations that a stage names are not there."""
    for name in recipe.data.conversations.keys() & {*stage.settings.data}:
        source = Source.from_mapping(recipe.data.conversations[name])
        find_layout(source.layout).shards(source)


def reads_regions(stage: ResolvedStage, recipe: Recipe) -> bool:
    """Whether a stage needs images with masks, or words made from them."""
    return stage.kind.reads == "regions" or bool({TEXT, *recipe.annotations} & {*stage.settings.data})


def argument_values(stage: ResolvedStage, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The fields of a stage's `TrainingArguments`, those that the run and the machine set among them."""
    values = {**stage.all_arguments(), "output_dir": str(folder), "seed": recipe.seed}
    if not torch.cuda.is_available():
        values |= {name: stage.arguments.get(name, default) for name, default in WITHOUT_GPU.items()}
    return values


WITHOUT_GPU = {"use_cpu": True, "dataloader_pin_memory": False}


def settings_in_force(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Every value that a run will have, as `--set` names it, and where it comes from: a file, the command line, a
    default, or fixed by the run.

    Returns:
        Key -> `value` and `source`; keys of stages are `stages.NAME.KEY`.
    """
    shared = {key: value for key, value in recipe.to_dict().items() if key not in ("stages", "training")}
    shared["augmentation"] = dataclasses.asdict(build(Augmentation, recipe.augmentation, "augmentation"))
    rows = {key: {"value": value, "source": _source(recipe, key) or "default"} for key, value in leaves(shared)}
    for stage in resolve_stages(recipe).values():
        where, own = f"stages.{stage.name}", dataclasses.asdict(stage.settings)
        values = argument_values(stage, recipe, Path(recipe.output) / "stages" / stage.name)
        fixed = {*SET_BY_RUN, *(name for name in (*FIXED, *FIXED_SFT) if name not in own)}
        for name, value in {"kind": stage.kind.kind, **own, **values}.items():
            source = _source(recipe, f"{where}.{name}") or _source(recipe, f"training.{name}")
            if name in fixed:
                source = "fixed"
            elif source is None and not torch.cuda.is_available() and name in WITHOUT_GPU:
                source = "no GPU here"
            elif source is None and name in DEFAULTS and value == DEFAULTS[name]:
                source = "default of medsight"
            # as JSON takes it
            plain = json.loads(json.dumps(value, default=str))
            rows[f"{where}.{name}"] = {"value": plain, "source": source or "default"}
    return rows


def _source(recipe: Recipe, key: str) -> str | None:
    """Where a value comes from, or its parts; None where it is not set."""
    if key in recipe.sources:
        return recipe.sources[key]
    parts = {source: None for name, source in recipe.sources.items() if name.startswith(f"{key}.")}
    return ", ".join(parts) or None


def topology(recipe: Recipe) -> dict[str, Any]:
    """What the run is spread over, as its launcher said: processes, device, sharding, and the batch of each stage."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    flags = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
    sharding = [name for flag, name in flags.items() if os.environ.get(flag, "false").lower() == "true"]
    batches = {}
    for stage in resolve_stages(recipe).values():
        size, micro = (stage.argument(f) for f in ("per_device_train_batch_size", "gradient_accumulation_steps"))
        batches[stage.name] = {"per_device": size, "accumulation": micro, "global": size * micro * processes}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"processes": processes, "device": device, "sharding": "".join(sharding) or "none", "batches": batches}


def shown(settings: Mapping[str, Mapping[str, Any]], spread: Mapping[str, Any]) -> str:
    """Settings in force and topology for a terminal; what is the same in all stages is said once."""
    sections: dict[str, list[list[str]]] = {"recipe": [], "every stage": []}
    rows = {key: [str(entry["value"]), entry["source"]] for key, entry in settings.items()}
    for key, cells in rows.items():
        if not key.startswith("stages."):
            sections["recipe"].append([key, *cells])
            continue
        _, name, field = key.split(".", 2)
        stages = [*spread["batches"]]
        if len(stages) > 1 and all(rows.get(f"stages.{other}.{field}") == cells for other in stages):
            if name == stages[0]:
                sections["every stage"].append([field, *cells])
        else:
            sections.setdefault(f"stage {name}", []).append([field, *cells])
    lines = [["processes", str(spread["processes"])], ["device", spread["device"]], ["sharding", spread["sharding"]]]
    for name, batch in spread["batches"].items():
        product = f"{batch['per_device']} a device x {batch['accumulation']} micro-batches x {spread['processes']}"
        lines.append([f"batch of {name}", f"{batch['global']} = {product}"])
    tables = [f"{title}\n{align(rows)}" for title, rows in sections.items() if rows]
    return "\n\n".join([*tables, f"topology\n{align(lines)}"])
