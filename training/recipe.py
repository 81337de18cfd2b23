"""A recipe: everything that is a choice in a training run, read from one YAML file.

`extends: other.yaml` takes another recipe, beside it or a shipped one, and changes what is written; `--set a.b=value`
changes one key more. Unknown keys are refused, naming the nearest known one.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


CONFIGS = Path(__file__).resolve().parent / "configs"
# Keys of a run that say how it is carried out, not what comes out: a resumed run may have others.
OPERATIONAL = (
    *("output", "threads"),
    *("logging_steps", "logging_first_step", "disable_tqdm", "report_to", "run_name", "logging_dir", "log_level"),
    *("save_steps", "save_strategy", "save_total_limit"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "ddp_timeout", "example_images", "project", "trackio_space_id"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),  # their product with the processes may not change
)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ModelSettings:
    """Where the model comes from: a named configuration, trained from nothing, or a folder.

    Attributes:
        preset: name of a `MedSightConfig` preset; its tokenizer is trained on the corpus' own text. With a folder, it
            is only what `--plan` reads while the folder is not there yet.
        folder: a checkpoint folder, as `medsight init` and `medsight convert` write, to start from.
        config: fields of `MedSightConfig` to change (the ablations among them). With a folder, only those that leave
            the shape of its weights.
        tokenizer_size: entries of a preset's byte-level BPE before added tokens and region codes.
        fit, image_mean, image_std: a preset's image processor.
        dtype: what is trained in; `bf16: true` in `training` is mixed precision on top of float32.
        save_dtype: what the finished folder's weights are stored in.
    """

    preset: str | None = None
    folder: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer_size: int = 1510
    fit: str = "pad"
    image_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    image_std: list[float] = field(default_factory=lambda: [0.25, 0.25, 0.25])
    dtype: str = "float32"
    save_dtype: str = "float32"


@dataclass
class DataSettings:
    """What is trained on; a source is a mapping with the fields of `medsight.data.sources.Source`.

    Attributes:
        regions: sources of images with masks (stages 1 and 3a, and what is annotated).
        conversations: sources of conversations, by a name that stages refer to.
        text: sources of conversations whose words alone stage 0 reads.
        text_rounds: conversations a region image that stage 0 reads besides.
        validation_fraction: share of patients held out of every set for validation.
        validation_seed: of their choice; by default the run's own, so that runs of several seeds differ in it too.
        on_error: `stop` at a broken item, or `skip`: count and log it; never replace it.
        keep_in_memory: decode every picture and mask once and keep it, for data sets that fit.
        groups: code group -> patterns of "modality/site"; by default one group per pair that the regions have.
        classes: mask classes, a target each; by default all targets of the regions.
    """

    regions: list[dict[str, Any]] = field(default_factory=list)
    conversations: dict[str, dict[str, Any]] = field(default_factory=dict)
    text: list[dict[str, Any]] = field(default_factory=list)
    text_rounds: int = 4
    validation_fraction: float = 0.1
    validation_seed: int | None = None
    on_error: str = "stop"
    keep_in_memory: bool = False
    groups: dict[str, list[str]] | None = None
    classes: list[str] | None = None


@dataclass
class AnnotationSettings:
    """Conversations made from the regions, once before the stage that first reads them.

    Attributes:
        per_image: conversations an image.
        plain_share: share of them that need no region; with 1 no codes are needed and stage 2 can read them.
        max_regions: most region codes in an answer.
        prompt_noise: share of the words of a training prompt that are misspelt or missing, names left out.
        templates: YAML file of wordings; the shipped one by default.
    """

    per_image: int = 8
    plain_share: float = 0.0
    max_regions: int = 5
    prompt_noise: float = 0.0
    templates: str | None = None


@dataclass
class Recipe:
    """A whole run.

    Attributes:
        output: the run's folder.
        seed: source of all chance.
        threads: CPU threads of torch, as many as it likes by default.
        training: fields of `TrainingArguments` for all stages.
        augmentation: strengths of the augmentation (`training.augmentation.Augmentation`).
        stages: settings a stage, in any order; a stage that is missing or null is left out.
    """

    output: str = "runs/medsight"
    seed: int = 0
    threads: int | None = None
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    annotations: dict[str, AnnotationSettings] = field(default_factory=dict)
    augmentation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the resolved YAML file holds them."""
        return dataclasses.asdict(self)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and set `a.b=value` overrides in it.

    Args:
        path: a YAML file, or the name of a shipped one ("nano").

    Raises:
        OSError: no such file.
        ValueError: it is no valid YAML, has an unknown key (naming the nearest known one), or a value of a wrong type.
    """
    path = find_recipe(path)
    values = _read(path)
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {override}: expected KEY=VALUE, for example seed=1")
        place = values
        *parents, last = name.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"--set {override}: {parent} in {path} is not a mapping")
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {override}: not valid YAML ({' '.join(str(error).split())})") from error
    recipe = build(Recipe, values, str(path))
    if recipe.model.preset is None and recipe.model.folder is None:
        raise ValueError(f"{path}: model: give a preset, to train from nothing, or a folder")
    if recipe.data.on_error not in ("stop", "skip"):
        raise ValueError(f"{path}: data.on_error={recipe.data.on_error!r}: choose stop or skip")
    for name, dtype in (("dtype", recipe.model.dtype), ("save_dtype", recipe.model.save_dtype)):
        if dtype not in DTYPES:
            raise ValueError(f"{path}: model.{name}={dtype!r}: choose one of {', '.join(DTYPES)}")
    if not 0 <= recipe.data.validation_fraction < 1:
        raise ValueError(f"{path}: data.validation_fraction={recipe.data.validation_fraction}: expected 0 to below 1")
    return recipe


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe, or of a shipped one named without `.yaml`."""
    path = Path(path)
    shipped = CONFIGS / f"{path}.yaml"
    if not path.is_file() and shipped.is_file():
        return shipped
    if not path.is_file():
        names = ", ".join(sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.yaml")))
        raise FileNotFoundError(f"recipe {path} does not exist; the shipped ones are {names}")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(values).__name__}")
    base = values.pop("extends", None)
    if base is None:
        return values
    beside, shipped = path.parent / base, CONFIGS / base
    other = shipped if shipped.is_file() and not beside.is_file() else beside
    if not other.is_file():
        raise FileNotFoundError(f"{path}: extends {other}, which does not exist")
    return merge(_read(other), values)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above`, mappings merged key by key."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else value
    return result


def build(kind: Any, values: Any, where: str) -> Any:
    """An instance of the dataclass `kind` from a mapping.

    Raises:
        ValueError: an unknown key or a value of a wrong type, with its place.
    """
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {values!r}")
    hints = typing.get_type_hints(kind)
    fields = [entry.name for entry in dataclasses.fields(kind) if entry.init]
    refuse_unknown(values, fields, where)
    return kind(**{key: convert(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` asks; YAML reads 1e-3 as a string, which a float takes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [argument for argument in arguments if argument is not type(None)]
        return convert(options[0], value, where) if len(options) == 1 else value
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if origin is dict and isinstance(value, Mapping):
        return {key: convert(arguments[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if origin is list and isinstance(value, list):
        return [convert(arguments[0], entry, f"{where}, entry {place}") for place, entry in enumerate(value)]
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{where}: expected a number, got {value!r}") from None
    expected = {float: float, int: int, str: str, bool: bool}.get(hint, {dict: dict, list: list}.get(origin))
    wrong = expected is not None and not isinstance(value, expected)
    if wrong or (hint is int and isinstance(value, bool)):
        name = {"dict": "a mapping", "list": "a list"}.get(kind := getattr(expected, "__name__", str(hint)), kind)
        raise ValueError(f"{where}: expected {name}, got {value!r}")
    return value


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ValueError for the first key that is not known, naming the nearest one that is."""
    known = sorted(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the known keys are {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: before -> now` for all that differs between two recipes, operational keys left out."""
    lines = []
    for key in [*before, *(key for key in now if key not in before)]:
        if key in OPERATIONAL:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return lines
