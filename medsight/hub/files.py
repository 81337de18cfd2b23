"""Which files of a folder belong to a published checkpoint: a list of what may go, and a reason for all that stays."""

import re
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

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


CARD, CODE = "README.md", "*_medsight.py"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DOCUMENTS = (CARD, CODES_FILE, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "example.png")
TEMPLATES, SHEETS = "additional_chat_templates", "region_codes"
UNFINISHED = (".saving-*", ".*.partial", "*.incomplete", ".*.new")
RESUMABLE = ("optimizer*", "scheduler.*", "rng_state*", "scaler.*", "stage_state.safetensors")
_PLACEHOLDER = "[More Information Needed]"
_RELATIVE = re.compile(r"^\s*from\s+\.(\w+)\s+import", flags=re.MULTILINE)
# The first that fits says why a file stays; none needs to fit, for only what is known to belong goes.
REASONS = (
    (".*", "hidden"),
    ("checkpoint-*", "a checkpoint to resume training from"),
    ("metrics*.json", "its figures are in the card; it also names single rows"),
    ("*.safetensors", "weights that the checkpoint does not use"),
    ("*.index.json", "an index of weights that are not there"),
    *((name, "a pickle, which may run code when it is read") for name in ("*.bin", "*.p[tk]*", "*.ckpt", "*.pickle")),
    *((name, "an array, not a file of a checkpoint") for name in ("*.np[yz]", "*.h5")),
    *((name, "a record of training") for name in ("trainer_state.json", "steps.jsonl", "*_results.json")),
    *((name, "a log") for name in ("*.log", "events.out.*", "runs", "logs", "wandb", "emissions.csv")),
    (SHEETS, "pictures of the data; contact_sheets names the folder where they may be published"),
    *((name, "a picture or scan, which may show a patient") for name in ("*.png", "*.jp*g", "*.tif*", "*.dcm")),
    *((name, "a picture or scan, which may show a patient") for name in ("*.nii", "*.nii.gz", "examples")),
    ("*.py", "not the model's own code"),
)


@dataclass(frozen=True)
class UploadFile:
    """One file of an upload.

    Attributes:
        path: where it goes in the repository.
        source: the file; None for one that is made for the upload.
        content: what is made.
    """

    path: str
    source: Path | None = None
    content: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        if self.content is not None:
            return len(self.content)
        assert self.source is not None
        return self.source.stat().st_size


@dataclass(frozen=True)
class Upload:
    """What of a folder is published.

    Attributes:
        kind: "model" or "adapter".
        files: by path.
        left_out: name in the folder -> why it stays.
    """

    kind: str
    files: list[UploadFile]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError, with an example, where it is no `namespace/name`."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, flags=re.ASCII):
        raise ValueError(f"repository {repo_id!r}: expected NAMESPACE/NAME, for example my-name/medsight-nano")


def files_to_push(folder: Path, contact_sheets: Path | None = None) -> Upload:
    """The files of a checkpoint, or of an adapter, that are published; nothing is read over the network.

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
    allowed = _adapter_names(folder) if kind == "adapter" else _model_names(folder)
    files, left_out = [], {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name in allowed:
            if path.name == CARD and _PLACEHOLDER.encode() in path.read_bytes():
                left_out[CARD] = f"has {_PLACEHOLDER} in it; another is rendered"
                continue
            files.append(UploadFile(path.name, path))
        elif path.is_dir() and path.name == TEMPLATES and kind == "model":
            files += [UploadFile(f"{TEMPLATES}/{file.name}", file) for file in sorted(path.glob("*.jinja"))]
        else:
            left_out[f"{path.name}/" if path.is_dir() else path.name] = _reason(path.name)
    for file in files:
        if file.size == 0:
            raise ValueError(f"{file.source} is empty: save the checkpoint again")
    if contact_sheets is not None:
        files += _sheets(contact_sheets)
    return Upload(kind, files, left_out)


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
    held = [path.name for path in folder.iterdir()]
    for name in (folder.absolute().name, *held):
        if any(fnmatch(name, pattern) for pattern in UNFINISHED):
            raise ValueError(f"{folder} is not finished: {name} is still being written, or was left by a crash")
    for name in held:
        if any(fnmatch(name, pattern) for pattern in RESUMABLE):
            raise ValueError(
                f"{folder} is a checkpoint to resume training from ({name}): push the model that training ends with"
            )


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


def refuse_unloadable(folder: Path) -> None:
    """Raise ValueError, naming the folder, where its settings, tokenizer or meanings of codes cannot be read."""
    from configuration_medsight.configuration_medsight import MedSightConfig
    from processing_medsight.processing_medsight import MedSightProcessor
    from processing_medsight.region_codes_medsight import find_region_codes

    try:
        MedSightConfig.from_pretrained(folder, local_files_only=True).refuse_contradictions()
        MedSightProcessor.from_pretrained(folder, local_files_only=True)
        find_region_codes(folder, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} would not load from the Hub ({type(error).__name__}: {reason})") from error


def _adapter_names(folder: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

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
    """The model's modules; all that `auto_map` needs are held to be there.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: an entry points into another repository, or there are none.
    """
    maps = [read_json(folder / name).get("auto_map") or {} for name in ("config.json", "processor_config.json")]
    if not all(maps):
        raise ValueError(f"{folder} does not name its own code (auto_map): save model and processor again")
    entries = {entry for some in maps for entry in some.values()}
    foreign = sorted(entry for entry in entries if not re.fullmatch(r"\w+_medsight\.\w+", str(entry)))
    if foreign:
        raise ValueError(f"{folder}: auto_map has {foreign[0]}, expected MODULE.CLASS: save model and processor again")
    found: set[str] = set()
    wanted = {entry.partition(".")[0] for entry in entries}
    while wanted:
        name = wanted.pop()
        path = folder / f"{name}.py"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} lacks {path.name}, which its code needs: save the model again")
        found.add(name)
        wanted |= set(_RELATIVE.findall(path.read_text(encoding="utf-8"))) - found
    return {path.name for path in folder.glob(CODE)}


def _sheets(folder: Path) -> list[UploadFile]:
    paths = sorted(folder.iterdir())
    sheets = [path for path in paths if re.fullmatch(r"(C\d+_\d+|SEG)\.png", path.name) and path.is_file()]
    if not sheets or len(sheets) != len(paths):
        other = next((path.name for path in paths if path not in sheets), "nothing")
        raise ValueError(f"contact sheets {folder}: expected C0_0.png and the like alone, found {other}")
    return [UploadFile(f"{SHEETS}/{path.name}", path) for path in sheets]


def _reason(name: str) -> str:
    return next((reason for pattern, reason in REASONS if fnmatch(name, pattern)), "not a file of a checkpoint")
