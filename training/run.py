"""A run: the stages of a recipe one after the other, in one folder, going on where it was stopped.

OUTPUT/recipe.yaml, environment.json, data.json     what was run, with what, on what
OUTPUT/stages/start/                                the model before any training
OUTPUT/stages/1_perceiver/checkpoint-N/             to resume from
OUTPUT/stages/1_perceiver/model/, finished.json     the stage's result; its presence means finished
OUTPUT/annotations/NAME/{training,validation}/      conversations with region codes
OUTPUT/model/                                       the result
"""

import contextlib
import dataclasses
import logging
import math
import random
from datetime import timedelta
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments, set_seed

from configuration_medsight.configuration_medsight import MedSightConfig
from medsight.data.sources import Source, find_layout

from .augmentation import Augmentation, Augmenter, sided_groups
from .corpus import Corpus, annotate_regions, conversation_rows, corpus_conversations, read_corpus, split_seed
from .examples import ExamplePictures
from .fresh_model import fresh_model
from .items import ConversationItems, Items, Places
from .recipe import Recipe, build, convert, refuse_unknown
from .run_folder import (
    describe_data,
    finish_stage,
    keep_recipe,
    load_folder,
    lock,
    on_main,
    open_folder,
    outdate_result,
    save_folder,
    save_result,
)
from .sampler import DrawSampler, rarity_weights
from .stage import Stage, StageSettings
from .stage_0_language_model import LanguageModelStage
from .stage_1_perceiver import PerceiverStage
from .stage_2_vision_to_text import VisionToTextStage
from .stage_3a_codebook import CodebookStage
from .stage_3b_text_to_vision import TextToVisionStage
from .stage_4_unified import UnifiedAgainStage, UnifiedStage
from .trainer import STEPS_FILE, StageTrainer, checkpoints, sft_trainer_class


STAGES: dict[str, type[Stage]] = {
    stage.key: stage
    for stage in (
        LanguageModelStage,
        PerceiverStage,
        VisionToTextStage,
        CodebookStage,
        TextToVisionStage,
        UnifiedStage,
        UnifiedAgainStage,
    )
}
logger = logging.getLogger(__name__)
LONGEST_WAIT = timedelta(hours=6)  # while one process annotates, the others wait
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
    "average_tokens_across_devices": False,
}
OWN = ("output_dir", "seed", "data_seed", "train_sampling_strategy")  # what each run gives of its own
OPTIMIZERS = {"optim", "optim_args", "optim_target_modules"}
DEFAULTS_SFT = {"gradient_checkpointing": False, "bf16": False}  # TRL's own differ
# "nll" leaves the model's own forward pass in place, which knows of masks.
FIXED_SFT = {
    "max_length": None,
    "packing": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "loss_type": "nll",
}


def train(recipe: Recipe, stage: str | None = None) -> Path:
    """Run all stages of a recipe that are not finished, or one of them.

    Args:
        stage: key of the only stage to run; the ones before it must be finished or left out.

    Returns:
        The folder of the result: the whole run's, or the stage's.

    Raises:
        OSError: files are missing, or the disk is full; the last good checkpoint is untouched.
        ValueError: a setting, an item or a loss is bad, naming it; or the folder holds a run of another recipe.
    """
    settings = stage_settings(recipe)
    refuse_missing_regions(recipe, settings)
    refuse_unknown(recipe.model.config, set(MedSightConfig.__annotations__), "model.config")
    if recipe.model.folder is not None and recipe.model.config.keys() & MedSightConfig.sub_configs.keys():
        raise ValueError("model.config: text_config and vision_config are the folder's own; leave them out")
    if stage is not None:
        refuse_unknown([stage], settings, "--stage")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    output = Path(recipe.output)
    state = PartialState(cpu=recipe.training.get("use_cpu", not torch.cuda.is_available()), timeout=LONGEST_WAIT)
    done = [key for key in STAGES if finished(output, key)]
    begun = [key for key in STAGES if key in done or checkpoints(stage_folder(output, key))]
    for key in [key for key in settings if key not in done]:
        training_arguments(stage_folder(output, key), *settings[key], recipe)  # refuses what only it can tell
        check_conversations(recipe, settings[key][0])
    ahead = takewhile(lambda key: key not in begun, reversed(STAGES))
    on_main(lambda: open_folder(output, recipe, done, [*ahead]))
    held = lock(output) if state.is_main_process else contextlib.nullcontext()
    with held:
        return run_stages(recipe, settings, stage, output)


def run_stages(recipe: Recipe, settings: dict[str, Any], stage: str | None, output: Path) -> Path:
    """What `train` does once the folder is its own."""
    state, corpus = PartialState(), read_corpus(recipe)
    on_main(lambda: describe_data(output, {"training": corpus.training, "validation": corpus.validation}))
    on_main(lambda: keep_recipe(output, recipe))
    previous = start_folder(recipe, corpus, output)
    for key in settings:
        if stage is not None and key != stage and not finished(output, key):
            if list(settings).index(key) < list(settings).index(stage):
                raise ValueError(f"stage {key} comes before {stage} and is not finished: run it first")
            break
        if not finished(output, key):
            on_main(lambda: outdate_result(output / "model"))
            run_stage(STAGES[key], settings[key], recipe, corpus, previous, output)
        elif state.is_main_process:
            print(f"stage {STAGES[key].folder} is finished: {stage_folder(output, key) / 'model'}", flush=True)
        previous = stage_folder(output, key) / "model"
        if key == stage:
            return previous
    on_main(lambda: save_result(previous, output / "model", recipe))
    return output / "model"


def stage_settings(recipe: Recipe) -> dict[str, tuple[StageSettings, dict[str, Any]]]:
    """For each stage of the recipe, in order, its own settings and the fields of `TrainingArguments`.

    Raises:
        ValueError: an unknown stage or key, naming the nearest known one; or settings that do not go together.
    """
    refuse_unknown(recipe.stages, STAGES, "stages")
    result = {}
    for key, kind in STAGES.items():
        values = recipe.stages.get(key)
        if values is None:
            continue
        own = [entry.name for entry in dataclasses.fields(kind.Settings)]
        arguments = {
            entry.name: entry for entry in dataclasses.fields(arguments_class(values.get("trainer", "trainer")))
        }
        fixed = {*OWN, *FIXED, *FIXED_SFT} - {*own}  # no argument of `TrainingArguments` is in the last
        known = [*own, *(name for name in arguments if name not in fixed)]
        for where, some in (("training", recipe.training), (f"stages.{key}", values)):
            for name in fixed & some.keys():
                raise ValueError(f"{where}: {name} is set by the run itself; leave it out")
            refuse_unknown(some, known, where)
        given = {**recipe.training, **values}
        chosen = {**DEFAULTS, **given}
        if "lr_scheduler_type" in given:  # the default arguments are the default schedule's
            chosen["lr_scheduler_kwargs"] = given.get("lr_scheduler_kwargs")
        if chosen.get("weight_decay") and not kind.decays:
            raise ValueError(
                f"stages.{key}: weight_decay={chosen['weight_decay']} would shrink the rows of all words, where this "
                "stage trains those of the region codes alone: set it to 0"
            )
        settings = build(kind.Settings, {k: v for k, v in chosen.items() if k in own}, f"stages.{key}")
        for name in OPTIMIZERS & given.keys() if settings.muon_learning_rate else ():
            raise ValueError(f"stages.{key}: {name} has no use beside muon_learning_rate: leave one of them out")
        for name, value in chosen.items():
            if value is False and name.endswith("_strategy"):
                chosen[name] = "no"  # which YAML reads as false
        passed = {
            name: convert(arguments[name].type, value, f"stages.{key}: {name}")
            for name, value in chosen.items()
            if name not in own
        }
        result[key] = (settings, passed)
    if not result:
        raise ValueError(f"the recipe has no stages: choose some of {', '.join(STAGES)}")
    for key, (settings, _) in result.items():
        if STAGES[key].reads == "conversations" and key != LanguageModelStage.key:
            if not settings.data:
                raise ValueError(f"stages.{key}: a language stage needs data: names of annotations or conversations")
            refuse_unknown(settings.data, [*recipe.annotations, *recipe.data.conversations], f"stages.{key}: data")
    refuse_codes_before_their_codebook(recipe, result)
    return result


def refuse_missing_regions(recipe: Recipe, settings: dict[str, tuple[StageSettings, dict[str, Any]]]) -> None:
    """Raise ValueError where there are no images with masks and something needs them, naming what does."""
    if recipe.data.regions:
        return
    reading = [f"stage {key}" for key, (own, _) in settings.items() if reads_regions(STAGES[key], own, recipe)]
    reading += [] if recipe.model.folder else [f"the preset {recipe.model.preset}"]
    if reading:
        raise ValueError(f"data.regions is empty, and images with masks are needed for {', '.join(reading)}")


def check_conversations(recipe: Recipe, settings: StageSettings) -> None:
    """Raise OSError or ValueError where the files of a source of conversations that a stage names are not there."""
    for name in recipe.data.conversations.keys() & {*settings.data}:
        source = Source.from_mapping(recipe.data.conversations[name])
        find_layout(source.layout).shards(source)


def refuse_codes_before_their_codebook(
    recipe: Recipe, settings: dict[str, tuple[StageSettings, dict[str, Any]]]
) -> None:
    """Raise ValueError where a stage before 3a reads answers whose codes 3a is yet to learn, naming both."""
    before = takewhile(lambda key: key != CodebookStage.key, settings)
    for key in before if CodebookStage.key in settings else ():
        for name in settings[key][0].data:
            if name in recipe.annotations and recipe.annotations[name].plain_share < 1:
                raise ValueError(
                    f"stages.{key}: the answers of {name} cite region codes, which stage {CodebookStage.key} learns "
                    "after it: name annotations of plain_share 1"
                )


def reads_regions(kind: type[Stage], settings: StageSettings, recipe: Recipe) -> bool:
    """Whether a stage needs images with masks, or words made from them."""
    return kind.reads == "regions" or kind is LanguageModelStage or bool(recipe.annotations.keys() & {*settings.data})


def arguments_class(trainer: str) -> type[TrainingArguments]:
    """`TrainingArguments`, or TRL's for its SFTTrainer."""
    if trainer == "trainer":
        return TrainingArguments
    if trainer != "sft":
        raise ValueError(f"trainer={trainer!r}: choose trainer or sft")
    from trl import SFTConfig

    return SFTConfig


def stage_folder(output: Path, key: str) -> Path:
    return output / "stages" / STAGES[key].folder


def finished(output: Path, key: str) -> bool:
    """Whether a stage's result is there; its model and this mark appear together."""
    return (stage_folder(output, key) / "finished.json").is_file()


def start_folder(recipe: Recipe, corpus: Corpus, output: Path) -> Path:
    """The folder of the model before any training: the recipe's, or a fresh one made from a preset."""
    if recipe.model.folder is not None:
        folder = Path(recipe.model.folder)
        from medsight.checkpoint import check_checkpoint

        check_checkpoint(folder)
        return folder
    folder = output / "stages" / "start"

    def make() -> None:
        if not folder.is_dir():
            set_seed(recipe.seed)
            model, processor = fresh_model(recipe, corpus.groups, corpus.classes, corpus_conversations(corpus))
            save_folder(model, processor, folder)

    on_main(make)
    return folder


def run_stage(
    kind: type[Stage],
    settings: tuple[StageSettings, dict[str, Any]],
    recipe: Recipe,
    corpus: Corpus,
    start: Path,
    output: Path,
) -> None:
    """Train one stage from the folder of the model before it, resuming from its last whole checkpoint."""
    own, passed = settings
    folder = output / "stages" / kind.folder
    on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    model, processor = load_folder(start, recipe, own)
    if reads_regions(kind, own, recipe):
        refuse_other_groups(corpus, model.config)
    places = Places(processor, model.config, corpus.groups, recipe.data.keep_in_memory)
    stage = kind(own, places, recipe.seed)
    last = checkpoints(folder)
    if not last:
        for name in (STEPS_FILE, "data.json"):
            on_main(partial((folder / name).unlink, missing_ok=True))
    state = PartialState()
    if not state.distributed_type.name.startswith(("FSDP", "DEEPSPEED")) and getattr(own, "method", "") != "qlora":
        model.to(state.device)  # the stage's start and annotation run the model before the trainer does
    for name in own.data:
        if name in recipe.annotations:
            on_main(partial(annotate_regions, corpus, name, model.eval(), processor, output))
    training = stage_items(stage, recipe, corpus, output, "training")
    validation = stage_items(stage, recipe, corpus, output, "validation")
    if kind.reads == "conversations":
        on_main(lambda: describe_data(folder, {"training": training.rows, "validation": validation.rows}))
    arguments = training_arguments(folder, own, passed, recipe)
    if not len(validation):
        arguments.eval_strategy = type(arguments.eval_strategy)("no")
    set_seed(recipe.seed)
    if not last:
        stage.start(model, training)
    model = stage.prepare(model)
    trainer_class = StageTrainer if own.trainer == "trainer" else sft_trainer_class()
    trainer = trainer_class(
        model=model,
        args=arguments,
        stage=stage,
        sampler=sampler(training, own, arguments, recipe.seed),
        train_dataset=training,
        eval_dataset=validation if len(validation) else None,
        data_collator=stage.collator(),
        processing_class=processor if own.trainer == "sft" else None,
    )
    if own.example_images and len(validation):
        trainer.add_callback(ExamplePictures(stage, validation, folder / "examples", own.example_images))
    result = trainer.train(resume_from_checkpoint=str(last[-1]) if last else None)
    metrics = {**result.metrics, **(trainer.evaluate() if len(validation) else {})}
    model = stage.finish(trainer.accelerator.unwrap_model(trainer.model))
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    on_main(lambda: finish_stage(folder, model, processor, weights, metrics))


def refuse_other_groups(corpus: Corpus, config: MedSightConfig) -> None:
    """Raise ValueError where the data's code groups are not those of a model with a codebook, in their order."""
    if config.use_region_codebook and corpus.groups.names != list(config.group_names):
        raise ValueError(
            f"data.groups names the groups {corpus.groups.names}, but those of the model, whose order counts, are "
            f"{list(config.group_names)}: name all of these"
        )


def stage_items(stage: Stage, recipe: Recipe, corpus: Corpus, output: Path, split: str) -> Items:
    """The training or validation samples of a stage."""
    if stage.key == "language_model":
        rows = hold_out_text(corpus_conversations(corpus), recipe, split)
    elif stage.reads == "regions":
        rows = corpus.split(split)
        told = zip(rows["targets"], rows["absent"], strict=True)
        rows = rows.select([i for i, (targets, absent) in enumerate(told) if targets or absent])
    else:
        rows = conversation_rows(corpus, stage.settings.data, output, split)
    augmenter = None
    if split == "training" and stage.settings.augment and stage.key != "language_model":
        values = dict(recipe.augmentation)
        if stage.reads == "conversations":
            values["flip"] = "none"  # a text may name a side
        strengths = build(Augmentation, values, "augmentation")
        sided = sided_groups(corpus.training, corpus.groups)
        augmenter = Augmenter(strengths, sided, strengths.orientation_free_groups(corpus.groups))
    skip = recipe.data.on_error == "skip"
    return stage.items(rows, split == "training", augmenter=augmenter, seed=recipe.seed, skip_errors=skip)


def hold_out_text(rows: Any, recipe: Recipe, split: str) -> Any:
    """A part of the conversations of the corpus' text, of all kinds, is for validation."""
    count = math.ceil(recipe.data.validation_fraction * len(rows))
    held = set(random.Random(split_seed(recipe)).sample(range(len(rows)), count))
    return rows.select([i for i in range(len(rows)) if (i in held) == (split == "validation")])


def sampler(items: Items, settings: StageSettings, arguments: TrainingArguments, seed: int) -> DrawSampler:
    """The order of a stage's training draws."""
    lengths = None
    if settings.group_by_length and isinstance(items, ConversationItems):
        lengths = [sum(len(turn["content"]) for turn in messages) for messages in items.rows["messages"]]
    weights = rarity_weights(items.rows["dataset"], items.rows["targets"], settings.rarity_power)
    size = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * PartialState().num_processes
    return DrawSampler(len(items), seed, weights, lengths, size)


def training_arguments(
    folder: Path, settings: StageSettings, passed: dict[str, Any], recipe: Recipe
) -> TrainingArguments:
    """The stage's `TrainingArguments`; what the trainer here depends on is fixed."""
    values = {**passed, **FIXED, "output_dir": str(folder), "seed": recipe.seed}
    if not torch.cuda.is_available():
        values.setdefault("use_cpu", True)
        values.setdefault("dataloader_pin_memory", False)
    if settings.trainer == "sft":
        values |= FIXED_SFT
        values = {**DEFAULTS_SFT, **values}
    arguments = arguments_class(settings.trainer)(**values)
    if arguments.n_gpu > 1:  # Trainer would divide batches by DataParallel, which cannot divide lists of masks
        logger.warning("one process trains on one GPU of %d; for all, start it by accelerate launch", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments
