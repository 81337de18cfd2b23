"""Which files of a folder belong to a published checkpoint: a list of what may go, and a reason for all that stays."""

import re
import tempfile
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open
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
    weight_files,
)
from processing_medsight import MedSightProcessor
from processing_medsight.region_codes_medsight import find_region_codes, is_region_code


CARD, CODE = "README.md", "*_medsight.py"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DOCUMENTS = (CARD, CODES_FILE, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "example.png")
TEMPLATES, SHEETS = "additional_chat_templates", "region_codes"
UNFINISHED = (".saving-*", ".*.partial", "*.incomplete", ".*.new")
RESUMABLE = ("optimizer*", "scheduler.*", "rng_state*", "scaler.*", "stage_state.safetensors")
# The first pattern that fits says why a file stays. None needs to fit: only what is known to belong goes.
REASONS = {
    ".*": "hidden",
    "checkpoint-*": "a checkpoint to resume training from",
    "metrics*.json": "its figures are in the card; it also names single rows",
    "*.safetensors": "weights that the checkpoint does not use",
    "*.index.json": "an index of weights that are not there",
    **dict.fromkeys(("*.bin", "*.p[tk]*", "*.ckpt"), "a pickle, which may run code when it is read"),
    **dict.fromkeys(("trainer_state.json", "steps.jsonl", "*_results.json"), "a record of training"),
    **dict.fromkeys(("*.log", "events.out.*", "runs", "logs", "wandb", "emissions.csv"), "a log"),
    SHEETS: "pictures of the data; contact_sheets names the folder where they may be published",
    **dict.fromkeys(
        ("*.png", "*.jp*g", "*.tif*", "*.dcm", "*.nii", "*.nii.gz", "examples"),
        "a picture or scan, which may show a patient",
    ),
    CODE: "code that the checkpoint does not use",
    "*.py": "not the model's own code",
}
_PLACEHOLDER = "[More Information Needed]"  # of the cards that peft and transformers make


@dataclass(frozen=True)
class Upload:
    """What of a folder is published.

    Attributes:
        kind: "model" or "adapter".
        files: path in the repository -> the file, or the content of one that is made for the upload.
        left_out: name in the folder -> why it stays.
    """

    kind: str
    files: dict[str, Path | bytes]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            path: len(file) if isinstance(file, bytes) else file.stat().st_size for path, file in self.files.items()
        }


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError, with an example, where it is no `namespace/name`."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, flags=re.ASCII):
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
    refuse_unfinished(folder)
    kind = "adapter" if (folder / ADAPTER_CONFIG).is_file() else "model"
    files: dict[str, Path | bytes] = {}
    if kind == "model":
        allowed = _model_names(folder)
        if not any(folder.glob(CODE)):
            files |= package_code()
    else:
        allowed = _adapter_names(folder)
    left_out = {}
    for path in sorted(folder.iterdir()):
        if path.name == CARD and path.is_file() and _PLACEHOLDER.encode() in path.read_bytes():
            left_out[CARD] = f"has {_PLACEHOLDER} in it; another is rendered"
        elif path.is_file() and path.name in allowed:
            files[path.name] = path
        elif path.is_dir() and path.name == TEMPLATES and kind == "model":
            files |= {f"{TEMPLATES}/{file.name}": file for file in sorted(path.glob("*.jinja"))}
        else:
            reasons = (reason for pattern, reason in REASONS.items() if fnmatch(path.name, pattern))
            name = f"{path.name}/" if path.is_dir() else path.name
            left_out[name] = next(reasons, "not a file of a checkpoint")
    if contact_sheets is not None:
        files |= _sheets(contact_sheets)
    upload = Upload(kind, dict(sorted(files.items())), left_out)
    for name, size in upload.sizes.items():
        if size == 0:
            raise ValueError(f"{folder / name} is empty: save the checkpoint again")
    return upload


def package_code() -> dict[str, Path | bytes]:
    """The code of a whole checkpoint, as saving the model and the processor of this package writes it."""
    with tempfile.TemporaryDirectory() as folder:
        write_remote_code(folder, *modeling_medsight.__path__, *processing_medsight.__path__)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def refuse_unfinished(folder: Path) -> None:
    """Raise where a folder is still being written, is a whole run's, or holds what resumes a training.

    Raises:
        OSError: there is no such folder.
        ValueError: naming what was found, and what to publish in its place.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such folder; name a checkpoint folder")
    if (folder / "stages").is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is the folder of a whole training run: push {folder / 'model'}, its result")
    entries = [path.name for path in folder.iterdir()]
    for name in (folder.absolute().name, *entries):
        if any(fnmatch(name, pattern) for pattern in UNFINISHED):
            raise ValueError(f"{folder} is not finished: {name} is still being written, or was left by a crash")
    for name in entries:
        if any(fnmatch(name, pattern) for pattern in RESUMABLE):
            raise ValueError(
                f"{folder} is a checkpoint to resume training from ({name}): push the model that training ends with"
            )


def refuse_unloadable(folder: Path) -> None:
    """Raise ValueError, naming the folder, where its settings, tokenizer or meanings of codes cannot be read."""
    try:
        MedSightConfig.from_pretrained(folder, local_files_only=True).refuse_contradictions()
        MedSightProcessor.from_pretrained(folder, local_files_only=True)
        find_region_codes(folder, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} would not load from the Hub ({type(error).__name__}: {reason})") from error


def _model_names(folder: Path) -> set[str]:
    check_checkpoint(folder)
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}: save the processor into the same folder")
    for path in folder.glob("*.json"):
        read_json(path)
    refuse_unloadable(folder)
    weights = {path.name for path in weight_files(folder)}
    index = {INDEX_FILE} if weights != {WEIGHTS_FILE} else set()
    return {*NEEDED, *OPTIONAL, *DOCUMENTS, *weights, *index, *_code_names(folder)}


def _adapter_names(folder: Path) -> set[str]:
    read_json(folder / ADAPTER_CONFIG)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} has an {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS}: save the adapter again")
    try:
        with safe_open(weights, framework="np") as tensors:
            names = list(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"weights file {weights} is damaged or incomplete ({error}); copy it again") from error
    if not names:
        raise ValueError(f"{weights} holds no tensors: save the adapter again")
    return {ADAPTER_CONFIG, ADAPTER_WEIGHTS, *(name for name in DOCUMENTS if name != CODES_FILE)}


def _code_names(folder: Path) -> set[str]:
    """The modules that `auto_map` names and all that they import; none where the folder has no code at all.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: an entry points into another repository, or there are none.
    """
    maps = [read_json(folder / name).get("auto_map") or {} for name in ("config.json", "processor_config.json")]
    if not all(maps):
        raise ValueError(f"{folder} does not name its own code (auto_map): save model and processor again")
    entries = {str(entry) for auto_map in maps for entry in auto_map.values()}
    foreign = sorted(entry for entry in entries if not re.fullmatch(r"\w+_medsight\.\w+", entry))
    if foreign:
        raise ValueError(f"{folder}: auto_map has {foreign[0]}, expected MODULE.CLASS: save model and processor again")
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
    paths = sorted(folder.iterdir())
    sheets = [path for path in paths if _is_sheet(path)]
    if not sheets or len(sheets) != len(paths):
        other = next((path.name for path in paths if path not in sheets), "nothing")
        raise ValueError(f"contact sheets {folder}: expected C0_0.png and the like alone, found {other}")
    return {f"{SHEETS}/{path.name}": path for path in sheets}


def _is_sheet(path: Path) -> bool:
    return path.suffix == ".png" and is_region_code(f"[{path.stem}]") and path.is_file()
