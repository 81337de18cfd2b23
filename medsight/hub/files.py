"""Which files of a folder belong to a published checkpoint: a list of what may go, and a reason for all that stays."""

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_medsight
import processing_medsight
from configuration_medsight import MedSightConfig
from configuration_medsight.remote_code_medsight import write_remote_code
from medsight.checkpoint import (
    CODES_FILE,
    INDEX_FILE,
    NEEDED,
    OPTIONAL,
    WEIGHTS_FILE,
    check_checkpoint,
    read_json,
    tensor_names,
    weight_files,
)
from processing_medsight import MedSightProcessor
from processing_medsight.region_codes_medsight import find_region_codes, is_region_code


CARD, CODE = "README.md", "*_medsight.py"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DOCUMENTS = (CARD, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "example.png")
SHEETS = "region_codes"
UNFINISHED = [".saving-*", ".*.partial", "*.incomplete", ".*.new"]
RESUMABLE = ["optimizer*", "scheduler.*", "rng_state*", "scaler.*", "stage_state.safetensors"]
# Why a file stays: the first reason with a pattern that fits. None needs to fit: only what is known to belong goes.
REASONS = {
    "hidden": [".*"],
    "a checkpoint to resume training from": ["checkpoint-*"],
    "its figures are in the card; it also names single rows": ["metrics*.json"],
    "weights that the checkpoint does not use": ["*.safetensors", "*.index.json"],
    "a pickle, which may run code when it is read": ["*.bin", "*.p[tk]*", "*.ckpt"],
    "a record of training": ["trainer_state.json", "steps.jsonl", "*_results.json"],
    "a log": ["*.log", "events.out.*", "runs", "logs", "wandb", "emissions.csv"],
    "pictures of the data; contact_sheets names the folder where they may be published": [SHEETS],
    "a picture or scan, which may show a patient": ["*.png", "*.jp*g", "*.tif*", "*.dcm", "*.nii*", "examples"],
    "code that the checkpoint does not use": [CODE],
    "not the model's own code": ["*.py"],
    "not a file of a checkpoint": ["*"],
}
_PLACEHOLDER = "[More Information Needed]"  # of the cards that peft and transformers make


@dataclass(frozen=True)
class Upload:
    """What of a folder is published.

    Example:
        >>> "model.safetensors" in files_to_push(Path("medsight/medsight-nano")).files
        True

    Attributes:
        kind: "model" or "adapter".
        files: path in the repository -> the file, or the content of one that is made for the upload.
        left_out: name in the folder -> why it stays.
    """

    kind: str
    files: dict[str, Path | bytes]
    left_out: dict[str, str]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its path."""
        files = sorted(self.files.items())
        return {path: len(file) if isinstance(file, bytes) else file.stat().st_size for path, file in files}


def is_repo_id(name: str) -> bool:
    """Whether it is a `namespace/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError, with an example, where it is no `namespace/name`."""
    if not is_repo_id(repo_id):
        raise ValueError(f"repository {repo_id!r}: expected NAMESPACE/NAME, for example my-name/medsight-nano")


def files_to_push(folder: Path, contact_sheets: Path | None = None) -> Upload:
    """The files of a checkpoint, or of an adapter, that are published; nothing is read over the network.

    A checkpoint folder without code, such as a bare checkout's medsight-nano, is published with this package's.

    Args:
        folder: a checkpoint folder, or one that peft saved an adapter to.
        contact_sheets: folder of contact sheets that `medsight codes --output` wrote. They show the images that they
            were made from, so they are published only where they are named.

    Raises:
        OSError: the folder, or a file that a checkpoint needs, is missing.
        ValueError: the folder is no finished checkpoint, or would not load from the Hub.
    """
    _refuse_unfinished(folder)
    kind = "adapter" if (folder / ADAPTER_CONFIG).is_file() else "model"
    allowed = _adapter_names(folder) if kind == "adapter" else _model_names(folder)
    files: dict[str, Path | bytes] = {}
    left_out = {}
    for path in sorted(folder.iterdir()):
        if path.name == CARD and path.is_file() and _PLACEHOLDER.encode() in path.read_bytes():
            left_out[CARD] = f"has {_PLACEHOLDER} in it; another is rendered"
        elif path.is_file() and path.name in allowed:
            files[path.name] = path
        else:
            name = f"{path.name}/" if path.is_dir() else path.name
            left_out[name] = next(why for why, patterns in REASONS.items() if _fits(path.name, patterns))
    if kind == "model" and not any(folder.glob(CODE)):
        files |= _package_code()
    if contact_sheets is not None:
        files |= _sheets(contact_sheets)
    return Upload(kind, files, left_out)


def _package_code() -> dict[str, Path | bytes]:
    """The code of a whole checkpoint, as saving the model and the processor of this package writes it."""
    with tempfile.TemporaryDirectory() as folder:
        write_remote_code(folder, *modeling_medsight.__path__, *processing_medsight.__path__)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _refuse_unfinished(folder: Path) -> None:
    """Raise where a folder is still being written, is a whole run's, or holds what resumes a training."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such folder; name a checkpoint folder")
    if (folder / "stages").is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is the folder of a whole training run: push {folder / 'model'}, its result")
    names = [path.name for path in folder.iterdir()]
    for name in (folder.absolute().name, *names):
        if _fits(name, UNFINISHED):
            raise ValueError(f"{folder} is not finished: {name} is still being written, or was left by a crash")
    for name in names:
        if _fits(name, RESUMABLE):
            raise ValueError(f"{folder} is to resume training from ({name}): push the model that training ends with")


def _model_names(folder: Path) -> set[str]:
    """The files of a checkpoint that may go; raises where it would not load from the Hub."""
    check_checkpoint(folder)
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}: save the processor into the same folder")
    for path in folder.glob("*.json"):
        read_json(path)
    try:
        MedSightConfig.from_pretrained(folder, local_files_only=True)
        MedSightProcessor.from_pretrained(folder, local_files_only=True)
        find_region_codes(folder, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} would not load from the Hub ({type(error).__name__}: {reason})") from error
    weights = {path.name for path in weight_files(folder)}
    index = set() if weights == {WEIGHTS_FILE} else {INDEX_FILE}
    return {*NEEDED, *OPTIONAL, *DOCUMENTS, CODES_FILE, *weights, *index, *_code_names(folder)}


def _adapter_names(folder: Path) -> set[str]:
    """The files of an adapter that may go; raises where one is missing or damaged."""
    read_json(folder / ADAPTER_CONFIG)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has an {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS}: save the adapter again")
    tensor_names(folder / ADAPTER_WEIGHTS)
    return {ADAPTER_CONFIG, ADAPTER_WEIGHTS, *DOCUMENTS}


def _code_names(folder: Path) -> set[str]:
    """The modules that `auto_map` names and all that they import; none where the folder has no code at all.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: an entry points into another repository, or there are none.
    """
    maps = [
        read_json(folder / name).get("auto_map") or {"": None} for name in ("config.json", "processor_config.json")
    ]
    entries = sorted({str(entry) for auto_map in maps for entry in auto_map.values()})
    for entry in entries:
        if not re.fullmatch(r"\w+_medsight\.\w+", entry):
            raise ValueError(f"{folder}: auto_map has {entry}, expected MODULE.CLASS: save model and processor again")
    if not any(folder.glob(CODE)):
        return set()
    named = {folder / f"{entry.partition('.')[0]}.py" for entry in entries}
    try:
        imported = {Path(file) for module in named for file in get_relative_import_files(module)}
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise FileNotFoundError(f"{folder} lacks {missing}, which its code needs: save the model again") from error
    return {path.name for path in named | imported}


def _sheets(folder: Path) -> dict[str, Path]:
    sheets = {path.name: path for path in sorted(folder.iterdir())}
    for name in sheets or ["nothing"]:
        if not (name.endswith(".png") and is_region_code(f"[{Path(name).stem}]")):
            raise ValueError(f"contact sheets {folder}: expected C0_0.png and the like alone, found {name}")
    return {f"{SHEETS}/{name}": path for name, path in sheets.items()}
