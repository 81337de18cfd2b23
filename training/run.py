"""A run: the stages of a recipe one after the other, in one folder; it resumes where it was stopped.

docs/training.md says what stands in the folder.
"""

import logging
from collections.abc import Collection
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments, set_seed

from configuration_medsight.configuration_medsight import MedSightConfig
from medsight.checkpoint import check_checkpoint
from medsight.conversion.extend import extend_folder, refuse_unfit
from medsight.processes import join_processes, lock, on_main

from . import run_folder
from .augmentation import Augmentation, Augmenter, sided_groups
from .canvas import Canvas
from .corpus import (
    Corpus,
    annotate_regions,
    conversation_rows,
    corpus_conversations,
    read_corpus,
    refuse_unknown_targets,
    warn_of_tested_pictures,
)
from .dataset import SampleDataset
from .examples import ExamplePictures
from .fresh_model import fresh_model
from .recipe import Recipe, build, refuse_unknown
from .sampler import DrawSampler, rarity_weights, with_replay
from .settings import (
    ResolvedStage,
    argument_values,
    arguments_class,
    check_conversations,
    reads_regions,
    refuse_missing_regions,
    resolve_stages,
    settings_in_force,
    topology,
)
from .stage import Stage, group_places, trained_module
from .trainer import STEPS_FILE, StageTrainer, checkpoints, sft_trainer_class
from .training_record import write_record


logger = logging.getLogger(__name__)
SETTINGS_FILE = "settings.json"


def train(recipe: Recipe, only: str | None = None) -> Path:
    """Run all stages of a recipe that are not finished, or one of them.

    Args:
        only: name of the only stage to run; the ones before it must be finished.

    Returns:
        The folder of the result: the whole run's, or the stage's.

    Raises:
        OSError: files are missing, or the disk is full; the last good checkpoint is untouched.
        ValueError: a setting, an item or a loss is bad, naming it; or the folder holds a run of another recipe.
    """
    stages = resolve_stages(recipe)
    refuse_missing_regions(recipe, stages.values())
    if recipe.model.folder is not None and recipe.model.config.keys() & MedSightConfig.sub_configs.keys():
        raise ValueError("model.config: text_config and vision_config are the folder's own; leave them out")
    refuse_unknown([only] if only else [], stages, "--stage")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    output = Path(recipe.output)
    longest = max(stage.argument("ddp_timeout") for stage in stages.values())
    cpu = recipe.training.get("use_cpu", not torch.cuda.is_available())
    join_processes(cpu, timeout=timedelta(seconds=longest))
    for stage in stages.values():
        if not run_folder.is_finished(output, stage.name):
            training_arguments(
                run_folder.stage_folder(output, stage.name), stage, recipe
            )  # refuses what only it can tell
            check_conversations(recipe, stage)
    on_main(lambda: run_folder.refuse_foreign(output))
    with lock(output, "training"):
        on_main(lambda: run_folder.open_folder(output, recipe))
        return run_stages(recipe, stages, only, output)


def run_stages(recipe: Recipe, stages: dict[str, ResolvedStage], only: str | None, output: Path) -> Path:
    """What `train` does once the folder is its own."""
    corpus = read_corpus(recipe)
    on_main(lambda: warn_of_tested_pictures(recipe))
    on_main(lambda: run_folder.describe_data(output, {"training": corpus.training, "validation": corpus.validation}))
    on_main(lambda: run_folder.keep_recipe(output, recipe))
    if not all(run_folder.is_finished(output, name) for name in stages):
        in_force = {"settings": settings_in_force(recipe), "topology": topology(recipe)}
        on_main(lambda: run_folder.write_if_changed(output / SETTINGS_FILE, in_force))
    previous = start_folder(recipe, corpus, output)
    config = MedSightConfig.from_pretrained(previous, local_files_only=True)
    if any(stage.kind.reads == "regions" for stage in stages.values()):
        refuse_unknown_targets(corpus, config)
    for stage in stages.values():
        for key in ("groups", "revive_groups"):
            group_places(config, getattr(stage.settings, key, None), f"stages.{stage.name}: {key}")
    for name, stage in stages.items():
        if run_folder.is_finished(output, name):
            PartialState().print(
                f"stage {name} is finished: {run_folder.stage_folder(output, name) / 'model'}", flush=True
            )
        elif only in (None, name):
            on_main(lambda: run_folder.outdate_result(output / "model"))
            run_stage(stage, recipe, corpus, previous, output)
            on_main(lambda: write_record(output, recipe, corpus))
        else:
            raise ValueError(f"stage {name} comes before {only} and is not finished: run it first")
        previous = run_folder.stage_folder(output, name) / "model"
        if name == only:
            return previous
    on_main(lambda: write_record(output, recipe, corpus))  # a kill may have come between a stage's end and its record
    on_main(lambda: run_folder.save_result(previous, output / "model", recipe))
    return output / "model"


def start_folder(recipe: Recipe, corpus: Corpus, output: Path) -> Path:
    """The folder of the model before any training: the recipe's; or, made from it and the data, one that is extended;
    or a fresh one made from a preset."""
    given, folder = recipe.model.folder, output / "stages" / "start"
    if given is not None:
        check_checkpoint(Path(given))
    if recipe.model.extend:
        refuse_unfit(Path(str(given)))
        added = corpus.additions.describe(MedSightConfig.from_pretrained(given, local_files_only=True))
        for line in added or [f"nothing: {given} knows all structures and groups of the data"]:
            PartialState().print(f"model.extend: {line}", flush=True)
    if given is not None and not corpus.additions:
        return Path(given)

    def make() -> None:
        if folder.is_dir():
            return
        set_seed(recipe.seed)
        if given is not None:
            device = str(PartialState().device)
            data = (corpus.training, folder, corpus.groups, corpus.additions)
            extend_folder(Path(given), *data, seed=recipe.seed, device=device)
        else:
            model, processor = fresh_model(recipe, corpus.groups, corpus.classes, corpus_conversations(corpus))
            run_folder.save_folder(model, processor, folder)

    on_main(make)
    return folder


def run_stage(resolved: ResolvedStage, recipe: Recipe, corpus: Corpus, start: Path, output: Path) -> None:
    """Train one stage from the folder of the model before it, resuming from its last whole checkpoint."""
    settings, folder = resolved.settings, run_folder.stage_folder(output, resolved.name)
    on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    method = getattr(settings, "method", "full")
    model, processor = run_folder.load_folder(start, recipe, quantised=method == "qlora", trains=settings.trains)
    groups = corpus.groups.names
    if reads_regions(resolved, recipe) and model.config.use_region_codebook and groups != [*model.config.group_names]:
        raise ValueError(
            f"the data are in the groups {groups}, the model has {[*model.config.group_names]}: leave group_names out "
            "of model.config, and name groups in data.groups"
        )
    if reads_regions(resolved, recipe) and model.config.use_region_codebook and corpus.orientations:
        model.config.group_orientations = {**(model.config.group_orientations or {}), **corpus.orientations}
    canvas = Canvas(processor, model.config, corpus.groups, recipe.data.keep_in_memory, corpus.elsewhere, corpus.known)
    stage = resolved.kind(resolved.name, settings, canvas, recipe.seed)
    last = checkpoints(folder)
    if not last:
        for name in (STEPS_FILE, "data.json"):
            on_main(partial((folder / name).unlink, missing_ok=True))
    state = PartialState()
    if not state.distributed_type.name.startswith(("FSDP", "DEEPSPEED")) and method != "qlora":
        model.to(state.device)  # the stage's start and annotation run the model before the trainer does
    for name in settings.data:
        if name in recipe.annotations:
            on_main(partial(annotate_regions, corpus, name, model.eval(), processor, output))
    training, validation = (stage_dataset(stage, recipe, corpus, split) for split in ("training", "validation"))
    if stage.reads == "conversations":
        on_main(lambda: run_folder.describe_data(folder, {"training": training.rows, "validation": validation.rows}))
    arguments = training_arguments(folder, resolved, recipe)
    if recipe.data.keep_in_memory and arguments.dataloader_num_workers:
        for dataset in (training, validation):
            dataset.preload()
    if not len(validation):
        arguments.eval_strategy = type(arguments.eval_strategy)("no")
    set_seed(recipe.seed)
    if not last:
        stage.start(trained_module(model, stage), training)
    model = stage.prepare(model)
    module = trained_module(model, stage)
    trainer = stage_trainer(stage, module, processor, arguments, training, validation, corpus.replayed)
    if settings.example_images and len(validation):
        pictures = ExamplePictures(stage, validation, folder / "examples", settings.example_images)
        trainer.add_callback(pictures)
    result = trainer.train(resume_from_checkpoint=str(last[-1]) if last else None)
    metrics = {**result.metrics, **(trainer.evaluate() if len(validation) else {})}
    model = stage.finish(model)  # the whole, whose modules the trainer trained
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if weights is not None and module is not model:
        weights = {**model.state_dict(), **{f"model.{name}": weight for name, weight in weights.items()}}
    on_main(lambda: run_folder.finish_stage(folder, model, processor, weights, metrics))


def stage_trainer(
    stage: Stage,
    module: Any,
    processor: Any,
    arguments: TrainingArguments,
    training: SampleDataset,
    validation: SampleDataset,
    replayed: Collection[str] = (),
) -> Any:
    """The trainer of a stage, which draws a step's samples alike for any number of processes."""
    settings, seed = stage.settings, stage.seed
    sets = training.rows["dataset"]
    chances = rarity_weights(sets, training.rows["targets"], settings.rarity_power)
    chances = with_replay(chances, sets, replayed, settings.replay_share)
    micro_batches = PartialState().num_processes * arguments.gradient_accumulation_steps
    samples_a_step = micro_batches * arguments.per_device_train_batch_size
    trainer_class = StageTrainer if settings.trainer == "trainer" else sft_trainer_class()
    return trainer_class(
        model=module,
        args=arguments,
        stage=stage,
        sampler=DrawSampler(len(training), seed, chances, samples_a_step),
        train_dataset=training,
        eval_dataset=validation if len(validation) else None,
        data_collator=stage.collator(),
        processing_class=processor if settings.trainer == "sft" else None,
    )


def stage_dataset(stage: Stage, recipe: Recipe, corpus: Corpus, split: str) -> SampleDataset:
    """The training or validation samples of a stage."""
    if stage.reads == "regions":
        rows = getattr(corpus, split)
        shown = zip(rows["targets"], rows["absent"], strict=True)
        rows = rows.select([i for i, (targets, absent) in enumerate(shown) if targets or absent])
    else:
        rows = conversation_rows(corpus, stage.settings.data, Path(recipe.output), split)
    augmenter = None
    if split == "training" and stage.settings.augment:
        text = {"flip": "none"} if stage.reads == "conversations" else {}  # a text may name a side
        strengths = build(Augmentation, {**recipe.augmentation, **text}, "augmentation")
        sided = sided_groups(corpus.training, corpus.groups)
        augmenter = Augmenter(strengths, sided, strengths.orientation_free_groups(corpus.groups))
    skip = recipe.data.on_error == "skip"
    return stage.dataset(rows, split == "training", augmenter=augmenter, seed=recipe.seed, skip_errors=skip)


def training_arguments(folder: Path, stage: ResolvedStage, recipe: Recipe) -> TrainingArguments:
    """The stage's `TrainingArguments`; what the trainer here depends on is fixed."""
    arguments = arguments_class(stage.settings.trainer)(**argument_values(stage, recipe, folder))
    if arguments.n_gpu > 1:  # Trainer would divide batches by DataParallel, which cannot divide lists of masks
        logger.warning("one process trains on one GPU of %d; for all, start it by accelerate launch", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments
