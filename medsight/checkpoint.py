"""Finds a checkpoint folder and checks that it is whole, without loading anything from it.

The command line imports this module before it knows whether torch is needed; `medsight.loading` needs it.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open

from medsight.files import write_text


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
REMEMBERED_FROM = 2**28  # bytes: what is smaller is hashed in a moment


def shipped_checkpoint() -> Path:
    """The small trained checkpoint that comes with the package."""
    return SHIPPED_FOLDER


def check_checkpoint(folder: Path) -> None:
    """Makes sure that `folder` is a MedSIGHT checkpoint whose weights are safetensors files, all there and complete.

    Raises:
        OSError: the folder, its config.json, or weight files are missing.
        ValueError: a file of it is damaged, or the folder holds another kind of model.
    """
    config = folder / "config.json"
    if not config.is_file():
        reason = "is a file" if folder.is_file() else "has no config.json" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"model folder {folder} {reason}; expected a checkpoint folder")
    model_type = read_json(config).get("model_type")
    if model_type != MODEL_TYPE:
        raise ValueError(
            f"model folder {folder} is no MedSIGHT checkpoint: its config.json has model_type {model_type!r}, "
            f"expected {MODEL_TYPE!r}"
        )
    weight_files(folder)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of any model's folder, all there and complete.

    Raises:
        OSError: there are none, or some that the index names are missing.
        ValueError: a file is damaged, or lacks a tensor that the index puts there.
    """
    files: dict[Path, set[str]] = {}
    if (folder / WEIGHTS_FILE).is_file():
        files[folder / WEIGHTS_FILE] = set()
    elif (folder / INDEX_FILE).is_file():
        for name, file in read_json(folder / INDEX_FILE).get("weight_map", {}).items():
            files.setdefault(folder / file, set()).add(name)
    if not files:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f"; {pickled[0]} is a pickle: `medsight convert` reads published ones safely" if pickled else ""
        raise FileNotFoundError(f"model folder {folder} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}{hint}")
    missing = sorted(path.name for path in files if not path.is_file())
    if missing:
        raise FileNotFoundError(
            f"model folder {folder} lacks {len(missing)} of {len(files)} weight files that {INDEX_FILE} names: "
            f"{', '.join(missing)}"
        )
    for path, expected in files.items():
        absent = sorted(expected - tensor_names(path))
        if absent:
            raise ValueError(
                f"weights file {path} lacks {absent[0]}, which {INDEX_FILE} says it holds; copy both again"
            )
    return list(files)


def tensor_names(path: Path) -> set[str]:
    """The names of the tensors in a safetensors file; raises ValueError where it is damaged."""
    try:
        with safe_open(path, framework="np") as weights:
            return set(weights.keys())
    except SafetensorError as error:
        raise ValueError(f"weights file {path} is damaged or incomplete ({error}); copy it again") from error


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

    That of a large checkpoint is remembered in Hugging Face's cache, until one of its files changes.

    Raises:
        OSError, ValueError: see `weight_files`.
    """
    files = sorted({*weight_files(folder), *settings_files(folder)})
    states = [file.stat() for file in files]
    if sum(state.st_size for state in states) < REMEMBERED_FROM:
        return sha256_of(files)
    # The system sets the time of change, st_ctime, whatever is done to a file.
    known = [(str(f.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in zip(files, states, strict=True)]
    memory = Path(HF_HOME, "medsight", hashlib.sha256(repr(known).encode("utf-8", "surrogateescape")).hexdigest())
    with suppress(OSError):
        return memory.read_text(encoding="ascii")
    digest = sha256_of(files)
    with suppress(OSError):  # a cache that cannot be written costs time alone
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_text(memory, digest)
    return digest
