"""The folder of a run: checked against the recipe, read and written whole."""

import math
import platform
import shutil
from collections.abc import Collection, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import BitsAndBytesConfig, GenerationConfig, TrainingArguments, set_seed

from configuration_medsight.configuration_medsight import MedSightConfig
from medsight.checkpoint import read_json
from medsight.files import staged_folder, write_json, write_text
from medsight.processes import LOCK_FILE
from modeling_medsight.modeling_medsight import MedSightForConditionalGeneration
from processing_medsight.processing_medsight import MedSightProcessor

from .corpus import fingerprint
from .precision import load_mixed, parts_in_float32
from .recipe import Recipe, differences
from .seg_token import CODES_OWN, drop_codebook
from .stage import PARTS
from .trainer import checkpoints


PACKAGES = ("transformers", "tokenizers", "datasets", "accelerate", "peft", "trl", "numpy", "scipy")
RECIPE_FILE, ENVIRONMENT_FILE, FINISHED_FILE = "recipe.yaml", "environment.json", "finished.json"
OUTDATED = ".outdated"  # stands beside a result that a later stage leaves behind


def stage_folder(output: Path, name: str) -> Path:
    return output / "stages" / name


def is_finished(output: Path, name: str) -> bool:
    """Whether a stage's result is there; its model and this mark appear together."""
    return (stage_folder(output, name) / FINISHED_FILE).is_file()


def refuse_foreign(output: Path) -> None:
    """Raise ValueError where the folder holds something else than a run."""
    holds = {path.name for path in output.iterdir()} - {LOCK_FILE} if output.is_dir() else ()
    if holds and RECIPE_FILE not in holds:
        raise ValueError(f"{output} is not empty and holds no run: choose another output")


def open_folder(output: Path, recipe: Recipe) -> None:
    """Make the run's folder, or resume in it if it holds a run of the same recipe.

    Stages that no step was made of, nor of any after them, may differ. Those whose steps are all made go by the number
    of processes then, not now.

    Raises:
        ValueError: the folder holds another run (with the differences), one of an earlier version, or something else.
    """
    file, versions = output / RECIPE_FILE, output / ENVIRONMENT_FILE
    if not file.is_file():
        refuse_foreign(output)
        output.mkdir(parents=True, exist_ok=True)
        write_json(versions, environment())
        return keep_recipe(output, recipe)
    before, now = read_recipe_file(file), recipe.to_dict()
    for values in (before, now):
        values["stages"] = _begun(output, values["stages"])
    processes = read_json(versions)["processes"]
    sizes = samples_a_step(now, PartialState().num_processes)
    sizes |= {name: size for name, size in samples_a_step(now, processes).items() if is_finished(output, name)}
    step = "samples a step (per_device_train_batch_size x gradient_accumulation_steps x processes) of "
    lines = differences(before, now) + differences(samples_a_step(before, processes), sizes, step)
    if lines:
        raise ValueError(
            f"{output} holds a run of another recipe; resume with the same one, or choose another output. "
            f"It differs in {'; '.join(lines)}"
        )


def read_recipe_file(file: Path) -> dict[str, Any]:
    """The resolved recipe of a run.

    Raises:
        ValueError: the run was begun by a version whose recipes had stages by name in place of a list.
    """
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    if isinstance(values.get("stages"), Mapping):
        raise ValueError(
            f"{file.parent} holds a run that an earlier version of medsight began, whose recipes had no list of "
            "stages: finish it with that version, or choose another output. A new run can start from its result: "
            f"--set model.folder={file.parent / 'model'}"
        )
    return values


def keep_recipe(output: Path, recipe: Recipe) -> None:
    """Write down what is run, where it is not there as it is now; a resumed run may have changed stages ahead."""
    file, now = output / RECIPE_FILE, recipe.to_dict()
    if not file.is_file() or differences(read_recipe_file(file), now):
        write_text(file, yaml.safe_dump(now, sort_keys=False, allow_unicode=True))


def write_if_changed(file: Path, content: Any) -> None:
    """Write JSON, where it is not there as it is now."""
    if not file.is_file() or read_json(file) != content:
        write_json(file, content)


def _begun(output: Path, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stages as far as the last one that a step was made of."""
    begun = [
        is_finished(output, entry["name"]) or checkpoints(stage_folder(output, entry["name"])) for entry in stages
    ]
    return stages[: max((place for place, made in enumerate(begun, start=1) if made), default=0)]


def samples_a_step(recipe: Mapping[str, Any], processes: int) -> dict[str, int]:
    """How many samples a step of each stage of a recipe is made of."""
    factors = ("per_device_train_batch_size", "gradient_accumulation_steps")
    defaults = {name: getattr(TrainingArguments, name) for name in factors}
    return {
        entry["name"]: processes * math.prod({**defaults, **recipe["training"], **entry}[name] for name in factors)
        for entry in recipe["stages"]
    }


def environment() -> dict[str, Any]:
    """Versions of what a run depends on."""
    installed = {found.metadata["Name"]: found.version for found in distributions()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "medsight": installed.get("medsight"),
        "python": platform.python_version(),
        "device": device,
        "processes": PartialState().num_processes,
        "torch": str(torch.__version__),  # names the build too
        **{package: installed.get(package) for package in PACKAGES},
    }


def describe_data(folder: Path, splits: Mapping[str, Any]) -> None:
    """Write the fingerprints of the rows of each split; a run, or a stage, resumes only on the same data.

    Raises:
        ValueError: the data are not what the run began with.
    """
    described = {name: {"rows": len(rows), "sha256": fingerprint(rows)} for name, rows in splits.items()}
    file = folder / "data.json"
    if file.is_file() and (lines := differences(read_json(file), described)):
        raise ValueError(f"the data have changed since {folder} began: {'; '.join(lines)}; choose another output")
    write_if_changed(file, described)


def finish_stage(folder: Path, model: Any, processor: Any, state: Any, metrics: dict[str, Any]) -> None:
    """Save a stage's model and mark the stage as finished."""
    save_folder(model, processor, folder / "model", state)
    write_json(folder / FINISHED_FILE, {"metrics": metrics, "environment": environment()})
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)


def load_folder(
    folder: Path, recipe: Recipe, quantised: bool = False, trains: Collection[str] = tuple(PARTS)
) -> tuple[MedSightForConditionalGeneration, MedSightProcessor]:
    """Model and processor of a folder, for training: in the recipe's dtype, with its changes of the configuration.

    Args:
        quantised: load the language model's linear layers in 4 bits, for QLoRA.
        trains: the parts that a stage trains: a language model that is none of them may be held in bfloat16.
    """
    processor = MedSightProcessor.from_pretrained(folder, local_files_only=True)
    config = MedSightConfig.from_pretrained(folder, local_files_only=True)
    reshaped = config.use_region_codebook and not recipe.model.config.get("use_region_codebook", True)
    if reshaped:
        drop_codebook(config, processor)
        set_seed(recipe.seed)
    for name in recipe.model.config.keys() - config.sub_configs.keys():
        setattr(config, name, recipe.model.config[name])
    config.refuse_contradictions()
    options: dict[str, Any] = {"config": config, "local_files_only": True, "use_safetensors": True}
    options["ignore_mismatched_sizes"] = reshaped
    dtype = getattr(torch, recipe.model.dtype)
    if quantised:  # of the language model's linear layers alone: the model leaves the others out
        in_four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        compute = {"bnb_4bit_compute_dtype": dtype}
        options["quantization_config"] = BitsAndBytesConfig(**in_four_bits, **compute)
    try:
        if (in_float32 := parts_in_float32(recipe.model, trains, folder)) is not None:
            model, loaded = load_mixed(folder, in_float32, **options)
        else:
            model, loaded = MedSightForConditionalGeneration.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, **options
            )
    except RuntimeError as error:
        raise ValueError(f"{folder}: its weights do not fit model.config={recipe.model.config} ({error})") from error
    misfits = {entry if isinstance(entry, str) else entry[0] for entry in loaded["mismatched_keys"]} - CODES_OWN
    if misfits:
        raise ValueError(f"{folder}: {', '.join(sorted(misfits))} do not fit model.config={recipe.model.config}")
    processor.image_seq_length = config.image_seq_length  # an ablation may leave the region rows out
    processor.region_codes = None  # what codes usually stand for was counted with other weights
    return model, processor


def save_folder(model: Any, processor: Any, folder: Path, state: Any = None) -> None:
    """Write a checkpoint folder, which appears whole or not at all, in the place of one that is there."""
    for left_by_a_kill in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    with staged_folder(folder, overwrite=True) as staged:
        try:
            model.save_pretrained(staged, state_dict=state)
            processor.save_pretrained(staged)
        except Exception as error:
            raise OSError(f"{folder} could not be written ({type(error).__name__}: {error})") from error


def end_ids(model: Any, processor: Any) -> int | list[int]:
    """The tokens that end an answer: those of the model's generation settings, or its tokenizer's."""
    ids = model.generation_config.eos_token_id
    return processor.tokenizer.eos_token_id if ids is None else ids


def save_result(last: Path, folder: Path, recipe: Recipe) -> None:
    """The result of a whole run: the last stage's model, stored in `save_dtype`, answering greedily by default.

    One that is there stays, unless a stage was trained after it was written (`outdate_result`).
    """
    outdated = folder.with_name(OUTDATED)
    if folder.is_dir() and not outdated.exists():
        return
    model = MedSightForConditionalGeneration.from_pretrained(last, local_files_only=True, dtype=torch.float32)
    processor = MedSightProcessor.from_pretrained(last, local_files_only=True)
    ends = {"eos_token_id": end_ids(model, processor), "pad_token_id": processor.tokenizer.pad_token_id}
    greedy = {"max_new_tokens": 160, "do_sample": False, "return_dict_in_generate": True}
    model.generation_config = GenerationConfig(**greedy, **ends)
    dtype = getattr(torch, recipe.model.save_dtype)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    stored = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    # A small model is stored in half the bytes and still computes in float32.
    model.config.dtype = torch.float32 if recipe.model.dtype == "float32" else dtype
    save_folder(model, processor, folder, stored)
    outdated.unlink(missing_ok=True)


def outdate_result(folder: Path) -> None:
    """Note, before another stage is trained, that the run's result is to be written anew after it."""
    if folder.is_dir():
        folder.with_name(OUTDATED).touch()
