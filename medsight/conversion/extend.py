"""Appends mask classes, code groups and their codes to a trained checkpoint, which goes on answering as it did.

Every old id, name and weight stays.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from configuration_medsight import MedSightConfig
from medsight.checkpoint import check_checkpoint, read_json, weight_files, weights_sha256
from medsight.data.additions import Additions, find_additions
from medsight.data.groups import Groups, load_groups, match_groups
from medsight.data.sources import Source, kind_of, load_source
from medsight.files import check_output, staged_folder
from medsight.loading import choose_device, load_checkpoint

from .convert import SHARD_SIZE, StrPath
from .extend_model import extend_model, find_starts, without_pictures


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def extend(
    model: StrPath,
    rows: Any,
    output: StrPath,
    *,
    groups: StrPath | Groups | None = None,
    classes: Sequence[str] | None = None,
    images: int = 4096,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> tuple[MedSightConfig, Additions]:
    """Writes a checkpoint folder with what data hold and a model does not know: mask classes, code groups, codes.

    Weights keep the precision that they are stored in. Where the data hold nothing new, the folder is copied.

    Args:
        model: checkpoint folder.
        rows: a `Source` of images with masks, or its rows (`REGION_FEATURES`), map-style.
        output: folder to write.
        groups: where pairs of modality and site belong, known groups or new ones: a YAML file, group -> patterns of
            "MODALITY/SITE", or [`Groups`]. A pair that neither it nor the model has a group for becomes a group.
        classes: the classes that there are to be; by default all targets.
        images: about so many images with something new are looked at.
        seed: of k-means.
        device: to look at them on.
        overwrite: replace the output folder if it holds a checkpoint.

    Returns:
        The new configuration, and what was added.

    Raises:
        OSError: a file is missing, or the output folder is taken.
        ValueError: the model is quantised or an adapter; the data have no masks, or names that are the model's but for
            case and spaces; or tokens follow the model's codes. Nothing is written then.
    """
    folder, output = Path(model), Path(output)
    refuse_unfit(folder)
    given = [Path(groups)] if isinstance(groups, (str, os.PathLike)) else []
    check_output(output, overwrite, inputs=[folder, *given, *([Path(rows.path)] if isinstance(rows, Source) else [])])
    rows = _rows_of(rows)
    config = MedSightConfig.from_pretrained(folder, local_files_only=True)
    chosen = load_groups(groups, None) if isinstance(groups, (str, os.PathLike)) else groups
    additions = find_additions(config, without_pictures(rows), chosen, classes)
    if not any(row["targets"] for row in without_pictures(rows)):
        raise ValueError("the data have no masks: a model is extended by what masks show")
    if not additions:
        with staged_folder(output, overwrite) as staged:
            shutil.copytree(folder, staged, dirs_exist_ok=True)
        return config, additions
    matched = match_groups(config, _pairs(rows), chosen, extend=True) if config.use_region_codebook else None
    extended = extend_folder(
        folder, rows, output, matched, additions, images=images, seed=seed, device=device, overwrite=overwrite
    )
    return extended, additions


def extend_folder(
    folder: Path,
    rows: Any,
    output: Path,
    groups: Groups | None,
    additions: Additions,
    *,
    images: int = 4096,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> MedSightConfig:
    """What `extend` does once it is known what is new; `groups` are the model's and the new ones.

    Raises:
        OSError, ValueError: as `extend`.
    """
    model, processor = load_checkpoint(folder, "auto")
    model.eval().to(choose_device(device))
    starts = find_starts(model, processor, rows, groups, additions, images, seed)
    extend_model(model.cpu(), processor, additions, starts, seed)
    save_extended(model, processor, folder, output, overwrite)
    return model.config


def refuse_unfit(folder: Path) -> None:
    """Raises OSError or ValueError where a folder is no whole checkpoint of plain weights."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter: extend the checkpoint that it was trained on, or merge it "
            "(merge_and_unload) and save the whole first"
        )
    check_checkpoint(folder)
    config = read_json(folder / "config.json")
    if config.get("quantization_config") or config.get("text_config", {}).get("quantization_config"):
        raise ValueError(
            f"{folder} is quantised: extend the checkpoint that it was made from, and quantise the result"
        )


def _rows_of(rows: Any) -> Any:
    """The rows of a source, or those that are given, which can be read again."""
    if not isinstance(rows, Source):
        return rows if hasattr(rows, "__getitem__") else list(rows)
    if kind_of(rows) != "regions":
        raise ValueError(f"{rows.path}: layout {rows.layout} holds conversations; a model is extended by masks")
    return load_source(rows)


def _pairs(rows: Any) -> set[tuple[str, str]]:
    return {(row["modality"], row["site"]) for row in without_pictures(rows)}


def save_extended(model: Any, processor: Any, before: Path, output: Path, overwrite: bool = False) -> None:
    """Writes an extended model into a folder, whole or not at all, each weight in the precision that it has in the
    folder `before`; what is known of codes stays known of them.

    Raises:
        OSError: the folder is taken or cannot be written.
    """
    stored: dict[str, torch.dtype | None] = {}
    for file in weight_files(before):
        with safe_open(file, framework="pt") as weights:
            stored |= {name: DTYPES.get(weights.get_slice(name).get_dtype()) for name in weights.keys()}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {
        name: tensor.to(stored.get(name) or tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    with staged_folder(output, overwrite) as folder:
        model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD_SIZE)
        if processor.region_codes is not None:
            processor.region_codes = {**processor.region_codes, "weights_sha256": weights_sha256(folder)}
        processor.save_pretrained(folder)
