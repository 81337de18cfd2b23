"""The folder of a run: kept from being used twice, checked against the recipe, read and written whole."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import GenerationConfig, TrainingArguments, set_seed

from configuration_medsight.configuration_medsight import MedSightConfig
from medsight.files import write_json, write_text
from modeling_medsight.modeling_medsight import MedSightForConditionalGeneration
from processing_medsight.processing_medsight import MedSightProcessor

from .corpus import fingerprint
from .recipe import Recipe, differences
from .seg_token import CODES_OWN, drop_codebook
from .stage import StageSettings
from .trainer import checkpoints


PACKAGES = ("transformers", "tokenizers", "datasets", "accelerate", "peft", "trl", "numpy", "scipy")
LOCK_FILE = ".lock"
RECIPE_FILE = "recipe.yaml"
OUTDATED = ".outdated"  # stands beside a result that a later stage leaves behind


@contextlib.contextmanager
def lock(output: Path) -> Iterator[None]:
    """Keep a run's folder from being trained in twice at once; the system lets go of it however a process ends.

    Raises:
        ValueError: another process trains there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(output / LOCK_FILE, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{output}: another process is training there; wait for it, or end it") from error
        yield


def on_main(work: Callable[[], Any]) -> Any:
    """Do something on the main process alone; all wait, and all raise if it fails."""
    state = PartialState()
    result: list[Any] = [None, None]
    if state.is_main_process:
        try:
            result[0] = work()
        except (OSError, ValueError) as error:
            if state.num_processes == 1:
                raise
            result[1] = error
    if state.num_processes > 1:
        broadcast_object_list(result)
        if result[1] is not None:
            raise result[1]
    return result[0]


def open_folder(output: Path, recipe: Recipe, finished: Collection[str] = (), ahead: Collection[str] = ()) -> None:
    """Make the run's folder, or go on in it if it holds a run of the same recipe.

    Args:
        finished: stages whose steps are all made: they go by the number of processes then, not now.
        ahead: stages that no step was made of, nor of any after them: their settings may have changed.

    Raises:
        ValueError: the folder holds another run (with the differences), or something else.
    """
    file, versions = output / RECIPE_FILE, output / "environment.json"
    now = recipe.to_dict()
    if file.is_file():
        before = yaml.safe_load(file.read_text(encoding="utf-8"))
        processes = json.loads(versions.read_text(encoding="utf-8"))["processes"]
        of_finished = {key: size for key, size in samples_a_step(now, processes).items() if key in finished}
        old, new = ({**some, "stages": _without(some["stages"], ahead)} for some in (before, now))
        lines = differences(old, new)
        lines += differences(
            samples_a_step(old, processes),
            {**samples_a_step(new, PartialState().num_processes), **of_finished},
            "samples a step (per_device_train_batch_size x gradient_accumulation_steps x processes) of ",
        )
        if lines:
            raise ValueError(
                f"{output} holds a run of another recipe; go on with the same one, or choose another output. "
                f"It differs in {'; '.join(lines)}"
            )
        return
    if output.is_dir() and any(path.name != LOCK_FILE for path in output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no run: choose another output")
    output.mkdir(parents=True, exist_ok=True)
    write_json(versions, environment())
    keep_recipe(output, recipe)


def keep_recipe(output: Path, recipe: Recipe) -> None:
    """Write down what is run, where it is not there as it is now; a run that goes on may have changed stages ahead."""
    file, now = output / RECIPE_FILE, recipe.to_dict()
    if not file.is_file() or differences(yaml.safe_load(file.read_text(encoding="utf-8")), now):
        write_text(file, yaml.safe_dump(now, sort_keys=False, allow_unicode=True))


def _without(stages: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: values for key, values in stages.items() if key not in keys}


def samples_a_step(recipe: Mapping[str, Any], processes: int) -> dict[str, int]:
    """How many samples a step of each stage of a recipe is made of."""
    defaults = {entry.name: entry.default for entry in dataclasses.fields(TrainingArguments)}
    factors = ("per_device_train_batch_size", "gradient_accumulation_steps")
    return {
        key: processes * math.prod({**defaults, **recipe["training"], **values}[name] for name in factors)
        for key, values in recipe["stages"].items()
        if values is not None
    }


def environment() -> dict[str, Any]:
    """Versions of what a run depends on."""

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    from medsight import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "medsight": __version__,
        "python": platform.python_version(),
        "device": device,
        "processes": PartialState().num_processes,
        "torch": str(torch.__version__),  # names the build too
        **{package: of(package) for package in PACKAGES},
    }


def describe_data(folder: Path, splits: Mapping[str, Any]) -> None:
    """Write the fingerprints of the rows of each split; a run, or a stage, goes on only on the same data.

    Raises:
        ValueError: the data are not what the run began with.
    """
    described = {name: {"rows": len(rows), "sha256": fingerprint(rows)} for name, rows in splits.items()}
    file = folder / "data.json"
    if not file.is_file():
        write_json(file, described)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    if before != described:
        lines = differences(before, described)
        raise ValueError(f"the data have changed since {folder} began: {'; '.join(lines)}; choose another output")


def finish_stage(folder: Path, model: Any, processor: Any, state: Any, metrics: dict[str, Any]) -> None:
    """Save a stage's model and mark the stage as finished."""
    save_folder(model, processor, folder / "model", state)
    write_json(folder / "finished.json", {"metrics": metrics, "environment": environment()})
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)


def load_folder(folder: Path, recipe: Recipe, settings: StageSettings) -> tuple[Any, MedSightProcessor]:
    """Model and processor of a folder, for training: in the recipe's dtype, with its changes of the configuration."""
    processor = MedSightProcessor.from_pretrained(folder, local_files_only=True)
    config = MedSightConfig.from_pretrained(folder, local_files_only=True)
    reshaped = config.use_region_codebook and not recipe.model.config.get("use_region_codebook", True)
    if reshaped:
        drop_codebook(config, processor)
        set_seed(recipe.seed)
    for name in recipe.model.config.keys() - config.sub_configs.keys():
        setattr(config, name, recipe.model.config[name])
    config.refuse_contradictions()
    options: dict[str, Any] = {"dtype": getattr(torch, recipe.model.dtype), "use_safetensors": True}
    options |= {"ignore_mismatched_sizes": reshaped, "output_loading_info": True}
    if getattr(settings, "method", "full") == "qlora":
        options |= quantised(options["dtype"])
    try:
        model, loaded = MedSightForConditionalGeneration.from_pretrained(
            folder, config=config, local_files_only=True, **options
        )
    except RuntimeError as error:
        raise ValueError(f"{folder}: its weights do not fit model.config={recipe.model.config} ({error})") from error
    misfits = {entry if isinstance(entry, str) else entry[0] for entry in loaded["mismatched_keys"]} - CODES_OWN
    if misfits:
        raise ValueError(f"{folder}: {', '.join(sorted(misfits))} do not fit model.config={recipe.model.config}")
    processor.image_seq_length = config.image_seq_length  # an ablation may leave the region rows out
    processor.region_codes = None  # what codes usually stand for was counted with other weights
    return model, processor


def quantised(dtype: torch.dtype) -> dict[str, Any]:
    """Loading options for QLoRA: 4 bits, which the model applies to its language model's linear layers alone."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": config}


def save_folder(model: Any, processor: Any, folder: Path, state: Any = None) -> None:
    """Write a checkpoint folder, which appears whole or not at all, in the place of one that is there."""
    partial = folder.with_name(f".saving-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, state_dict=state)
        processor.save_pretrained(partial)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder} could not be written ({type(error).__name__}: {error})") from error
    if folder.is_dir():
        before = folder.with_name(f".before-{folder.name}")
        shutil.rmtree(before, ignore_errors=True)
        os.replace(folder, before)
        os.replace(partial, folder)
        shutil.rmtree(before)
    else:
        os.replace(partial, folder)


def save_result(last: Path, folder: Path, recipe: Recipe) -> None:
    """The result of a whole run: the last stage's model, stored in `save_dtype`, answering greedily by default.

    One that is there stays, unless a stage was trained after it was written (`outdate_result`).
    """
    outdated = folder.with_name(OUTDATED)
    if folder.is_dir() and not outdated.exists():
        return
    model = MedSightForConditionalGeneration.from_pretrained(last, local_files_only=True, dtype=torch.float32)
    processor = MedSightProcessor.from_pretrained(last, local_files_only=True)
    model.generation_config = GenerationConfig(
        max_new_tokens=160,
        do_sample=False,
        return_dict_in_generate=True,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
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
