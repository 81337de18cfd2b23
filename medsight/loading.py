"""Loads a checkpoint that `medsight.checkpoint` has found to be whole, and chooses a device for it."""

from pathlib import Path

import torch

from modeling_medsight import MedSightForConditionalGeneration
from processing_medsight import MedSightProcessor


def choose_device(device: str) -> torch.device:
    """The torch device of that name; "auto" is a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device!r} is not there ({reason}); use auto, cpu or cuda") from error
    return chosen


def load_checkpoint(folder: Path, dtype: str) -> tuple[MedSightForConditionalGeneration, MedSightProcessor]:
    """The model and processor of a checked checkpoint folder, by this package's own classes, offline.

    Raises:
        ValueError: files of the processor are missing or damaged, or weights and configuration do not belong together.
    """
    try:
        processor = MedSightProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model folder {folder}: its processor cannot be loaded ({reason})") from error
    # Mismatches are let through here to be reported below, with the name of a weight.
    model, loaded = MedSightForConditionalGeneration.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loaded[kind]:
            first = min(entry if isinstance(entry, str) else entry[0] for entry in loaded[kind])
            raise ValueError(
                f"model folder {folder}: its weights do not fit its config.json ({len(loaded[kind])} "
                f"{kind.replace('_', ' ')}, first: {first}); convert or copy it again"
            )
    return model, processor
