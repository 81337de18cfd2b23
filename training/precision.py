"""The precision that a language model is held in where a stage does not train it."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open

from medsight.checkpoint import weight_files
from modeling_medsight.modeling_medsight import MedSightForConditionalGeneration
from modeling_medsight.pretrained_medsight import NOT_QUANTIZED

from .recipe import ModelSettings
from .stage import PARTS


HEAD = "lm_head."
BESIDE = tuple(f"model.{name}." for name in NOT_QUANTIZED if name not in HEAD)  # all but the language model
VOCABULARY = PARTS["code_rows"]


def parts_in_float32(settings: ModelSettings, trains: Collection[str], folder: Path | None) -> tuple[str, ...] | None:
    """What a stage holds in float32 (beginnings of names), with the rest, its frozen language model, in bfloat16. Of
    the vocabulary, that is the tables that train, or that a stage before has trained.

    Args:
        settings: see `frozen_dtype` there.
        trains: the parts that the stage trains.
        folder: of the model before it; None stands for one whose language model is stored in bfloat16.

    Returns:
        None where all is held in `settings.dtype`: the language model trains, is stored otherwise, or is sharded, as
        parameters of one precision are.
    """
    sharded = PartialState().distributed_type.name.startswith(("FSDP", "DEEPSPEED"))
    if "language_model" in trains or settings.dtype != "float32" or settings.frozen_dtype == "float32" or sharded:
        return None
    dtypes = {} if folder is None else stored_dtypes(folder)
    layers = {name for name in dtypes if name.startswith("model.language_model.") and not name.startswith(VOCABULARY)}
    if any(dtypes[name] != "BF16" for name in layers):
        return None
    trained = {name for name, dtype in dtypes.items() if name.startswith(VOCABULARY) and dtype != "BF16"}
    return (*BESIDE, *(VOCABULARY if trained or "code_rows" in trains else ()))


def stored_dtypes(folder: Path) -> dict[str, str]:
    """The dtype of each tensor in a checkpoint folder, in safetensors' words."""
    found: dict[str, str] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            found |= {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
    return found


def load_mixed(folder: Path, in_float32: Collection[str], **options: Any) -> Any:
    """What `from_pretrained` gives for a folder, in bfloat16 but for `in_float32`; no weight passes through another
    precision on its way."""
    patterns = [f"^{re.escape(name)}" for name in in_float32]  # transformers searches names for them
    before = MedSightForConditionalGeneration._keep_in_fp32_modules_strict
    MedSightForConditionalGeneration._keep_in_fp32_modules_strict = patterns
    try:
        model, loaded = MedSightForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True, **options
        )
    finally:
        MedSightForConditionalGeneration._keep_in_fp32_modules_strict = before
    for name, parameter in model.named_parameters():  # what the folder lacks was made in bfloat16
        if name.startswith(tuple(in_float32)):
            parameter.data = parameter.data.float()
    return model, loaded


def hold_in_bfloat16(model: Any, in_float32: Collection[str]) -> None:
    """Cast all parameters to bfloat16 but for those of `in_float32`; tied ones stay tied."""
    for name, parameter in model.named_parameters():
        if not name.startswith(tuple(in_float32)):
            parameter.data = parameter.data.to(torch.bfloat16)
