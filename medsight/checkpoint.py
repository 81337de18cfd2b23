"""Finds a checkpoint folder, checks that it is whole before anything is loaded from it, and loads it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from modeling_medsight import MedSightForConditionalGeneration
from processing_medsight import MedSightProcessor


MODEL_TYPE = "medsight"
SHIPPED_FOLDER = Path(__file__).resolve().parent / "medsight-nano"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NEEDED = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
OPTIONAL = (
    *("generation_config.json", "preprocessor_config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)
CODES_FILE = "region_codes.json"


def shipped_checkpoint() -> Path:
    """The small trained checkpoint that comes with the package.

    Raises:
        FileNotFoundError: this installation has none.
    """
    if not SHIPPED_FOLDER.is_dir():
        raise FileNotFoundError(
            f"this installation has no {SHIPPED_FOLDER.name} folder; name a model folder (--model DIR)"
        )
    return SHIPPED_FOLDER


def check_checkpoint(folder: Path) -> None:
    """Makes sure that `folder` is a MedSIGHT checkpoint whose weights are safetensors files, all there and complete.

    Raises:
        OSError: the folder, its config.json, or weight files are missing.
        ValueError: a file of it is damaged, or the folder holds another kind of model.
    """
    if not folder.exists():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"model {folder} is a file; expected a checkpoint folder")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model folder {folder} is no MedSIGHT checkpoint: it has no config.json")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != MODEL_TYPE:
        raise ValueError(
            f"model folder {folder} is no MedSIGHT checkpoint: its config.json has model_type {model_type!r}, "
            f"expected {MODEL_TYPE!r}"
        )
    for path, expected in weight_files(folder).items():
        try:
            with safe_open(path, framework="np") as weights:
                absent = sorted(expected - set(weights.keys()))
        except SafetensorError as error:
            raise ValueError(f"weights file {path} is damaged or incomplete ({error}); copy it again") from error
        if absent:
            raise ValueError(
                f"weights file {path} lacks {absent[0]}, which {INDEX_FILE} says it holds; copy both again"
            )


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """Each safetensors file of a checkpoint folder, with the tensors that the index puts there, if there is one.

    Raises:
        OSError: there are none, or some that the index names are missing.
        ValueError: the index is damaged.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return {folder / WEIGHTS_FILE: set()}
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX_FILE} has no weight_map; copy it again")
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(folder / str(file), set()).add(name)
        missing = sorted(path.name for path in files if not path.is_file())
        if missing:
            raise FileNotFoundError(
                f"model folder {folder} lacks {len(missing)} of {len(files)} weight files that {INDEX_FILE} names: "
                f"{', '.join(missing)}"
            )
        return files
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise FileNotFoundError(
            f"model folder {folder} has no {WEIGHTS_FILE}; {pickled[0]} is a pickle, which is never loaded: "
            "`medsight convert` reads published files safely"
        )
    raise FileNotFoundError(f"model folder {folder} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not valid JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def sha256_of(files: Sequence[Path]) -> str:
    """One hash of the names, sizes and contents of `files`, in their order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        with file.open("rb") as content:
            while chunk := content.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def weights_sha256(folder: Path) -> str:
    """One hash of the weights of a checkpoint, which tells whether figures are about them.

    Raises:
        OSError, ValueError: see `weight_files`.
    """
    return sha256_of(sorted(weight_files(folder)))


def settings_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's configuration, tokenizer and processor, in the order of their names."""
    return [folder / name for name in sorted((*NEEDED, *OPTIONAL, INDEX_FILE)) if (folder / name).is_file()]


def checkpoint_sha256(folder: Path) -> str:
    """One hash of all that decides on answers: weights, configuration, tokenizer and processor settings.

    Raises:
        OSError, ValueError: see `weight_files`.
    """
    return sha256_of(sorted({*weight_files(folder), *settings_files(folder)}))


def choose_device(device: str) -> torch.device:
    """The torch device of that name; "auto" is a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: expected auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: this machine or this torch has no CUDA; use cpu")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device!r} is not there ({reason}); use cpu or cuda") from error
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
