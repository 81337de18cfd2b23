"""A recipe: everything that is a choice in a training run, read from one YAML file (docs/training.md).

Entries of a list that have a `name`, such as stages, are merged by it, in `extends` and `--set` alike. There, null
drops what is inherited, back to the default, and the tag `!replace` before a mapping or list puts it in the place of
what is inherited.
"""

import contextlib
import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from medsight.text import nearest


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
STAGE_NAME = re.compile(r"[\w-]+")
DTYPES = ("float32", "bfloat16", "float16")


class Replace:
    """A value with the tag `!replace`: it is not merged with what is inherited."""

    def __init__(self, value: Any) -> None:
        self.value = value


class RecipeLoader(yaml.SafeLoader):
    """Reads YAML with the tag `!replace`."""


def _read_replace(loader: RecipeLoader, node: yaml.Node) -> Replace:
    if isinstance(node, yaml.MappingNode):
        return Replace(loader.construct_mapping(node, deep=True))
    if isinstance(node, yaml.SequenceNode):
        return Replace(loader.construct_sequence(node, deep=True))
    raise yaml.constructor.ConstructorError(None, None, "!replace stands before a mapping or a list", node.start_mark)


RecipeLoader.add_constructor("!replace", _read_replace)


@dataclass
class ModelSettings:
    """Where the model comes from: a named configuration, trained from scratch, or a folder.

    Attributes:
        preset: name of a `MedSightConfig` preset; its tokenizer is trained on the corpus' own text. With a folder, it
            is only what `--plan` reads while the folder is not there yet.
        folder: a checkpoint folder, as `medsight init` and `medsight convert` write, to start from, with its own
            groups and classes.
        extend: append the structures and groups of the data that the folder lacks (`medsight.conversion.extend`).
        config: fields of `MedSightConfig` to change (the ablations among them). With a folder, only those that leave
            the shape of its weights.
        tokenizer_size: entries of a preset's byte-level BPE before added tokens and region codes.
        fit, image_mean, image_std: a preset's image processor.
        dtype: what is trained in; `bf16: true` in `training` is mixed precision on top of float32.
        frozen_dtype: what a language model is held in by stages that do not train it: `stored`, that is in bfloat16
            where the folder has it in bfloat16, which loses nothing; or `float32`. Sharded runs hold `dtype`.
        save_dtype: what the finished folder's weights are stored in.
    """

    preset: str | None = None
    folder: str | None = None
    extend: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer_size: int = 1510
    fit: str = "pad"
    image_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    image_std: list[float] = field(default_factory=lambda: [0.25, 0.25, 0.25])
    dtype: str = "float32"
    frozen_dtype: str = "stored"
    save_dtype: str = "float32"


@dataclass
class DataSettings:
    """What is trained on; a source is a mapping with the fields of `medsight.data.sources.Source`.

    Attributes:
        regions: sources of images with masks, for stages that read regions, and to be annotated.
        replay: sources of images with masks that the model learnt from before, which it should not forget: they are
            trained on besides, as a stage's `replay_share` says.
        conversations: sources of conversations, by a name that stages refer to.
        text: sources of conversations whose words alone are read, by stages whose data are `text`.
        text_rounds: conversations a region image that are made for these besides.
        validation_fraction: share of patients held out of every set for validation.
        validation_seed: of their choice; by default the run's own, so that runs of several seeds differ in it too.
        on_error: `stop` at a broken item, or `skip`: count and log it; never replace it.
        keep_in_memory: decode every picture and mask once and keep it, for data sets that fit; worker processes share
            them.
        groups: code group -> patterns of "modality/site"; by default one group per pair that the regions have. With a
            folder, whose groups are its own, where pairs belong that it does not know.
        classes: mask classes, a target each; by default all targets of the regions. With a folder, which of the
            targets `model.extend` may add.
    """

    regions: list[dict[str, Any]] = field(default_factory=list)
    replay: list[dict[str, Any]] = field(default_factory=list)
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
        plain_share: share of them that need no region; with 1 no codes are needed, and a stage before the codebook can
            read them.
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
        stages: one after the other; each has a `name`, a `kind` (`training.stage.stage_kinds`), and settings: those of
            its kind, and fields of `TrainingArguments`.
        sources: where a value comes from: its key, as `--set` takes it -> a file, or what else changed it.

    Example:

    ```python
    >>> from medsight.training.recipe import load_recipe
    >>> recipe = load_recipe("nano", ["stages.perceiver.max_steps=5"])
    >>> recipe.stage("perceiver")["max_steps"], recipe.sources["seed"]
    (5, 'nano.yaml')

    ```
    """

    output: str = "runs/medsight"
    seed: int = 0
    threads: int | None = None
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    annotations: dict[str, AnnotationSettings] = field(default_factory=dict)
    augmentation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the resolved YAML file holds them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "sources"}

    def stage(self, name: str) -> dict[str, Any] | None:
        """The entry of a stage; None where there is none of that name."""
        return next((entry for entry in self.stages if entry["name"] == name), None)

    def changed(self, changes: Mapping[str, Any], source: str) -> "Recipe":
        """The recipe with other values, merged as `extends` merges; `source` is what they come from.

        Raises:
            ValueError: as [`build`].
        """
        recipe = build(Recipe, merge(self.to_dict(), changes, source), source)
        recipe.sources = merged_sources(self.sources, changes, source, recipe.to_dict())
        return recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and set `a.b=value` overrides in it.

    Args:
        path: a YAML file, or the name of a shipped one ("nano").

    Raises:
        OSError: no such file.
        ValueError: it is no valid YAML, has an unknown key (naming the nearest known one), or a value of a wrong type.
    """
    path = find_recipe(path)
    values, sources = _read(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {override}: expected KEY=VALUE, for example seed=1")
        value = _parsed(text, f"--set {override}")
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value, f"--set {override}")
        sources = merged_sources(sources, value, "command line", values)
    recipe = build(Recipe, values, str(path))
    recipe.sources = sources
    _refuse_bad_values(recipe, path)
    return recipe


def _refuse_bad_values(recipe: Recipe, path: Path) -> None:
    model, data = recipe.model, recipe.data
    if model.preset is None and model.folder is None:
        raise ValueError(f"{path}: model: give a preset, to train from scratch, or a folder")
    for name, value, choices in (
        ("data.on_error", data.on_error, ("stop", "skip")),
        ("model.dtype", model.dtype, DTYPES),
        ("model.frozen_dtype", model.frozen_dtype, ("stored", "float32")),
        ("model.save_dtype", model.save_dtype, DTYPES),
    ):
        if value not in choices:
            raise ValueError(f"{path}: {name}={value!r}: choose one of {', '.join(choices)}")
    if not 0 <= data.validation_fraction < 1:
        raise ValueError(f"{path}: data.validation_fraction={data.validation_fraction}: expected 0 to below 1")


def find_recipe(path: str | Path, beside: Path = Path(), said: str = "recipe") -> Path:
    """The file of a recipe in the folder `beside`, or of a shipped one, with or without `.yaml`."""
    for file in (beside / path, CONFIGS / path, CONFIGS / f"{path}.yaml"):
        if file.is_file():
            return file
    names = ", ".join(sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.yaml")))
    raise FileNotFoundError(f"{said} {beside / path} does not exist; the shipped ones are {names}")


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, RecipeLoader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a file and of those that it extends, and the file that each comes from."""
    try:
        values = _parsed(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(values).__name__}")
    base = values.pop("extends", None)
    name = path.relative_to(CONFIGS).as_posix() if path.is_relative_to(CONFIGS) else str(path)
    if base is None:
        return merge({}, values, str(path)), sources_of(values, name)
    found = find_recipe(base, path.parent, f"{path}: extends")
    values_below, sources_below = _read(Path(os.path.normpath(found)))
    extended = {key: f"{source.removesuffix(' (extended)')} (extended)" for key, source in sources_below.items()}
    merged = merge(values_below, values, str(path))
    return merged, merged_sources(extended, values, name, merged)


def is_named_list(value: Any) -> typing.TypeGuard[list[Any]]:
    """Whether a value is a list of entries that are found by their names."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) and "name" in v for v in value)


def by_name(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {entry["name"]: entry for entry in entries}


def merge(below: Mapping[str, Any], above: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """`below` with the values of `above`: mappings key by key, and lists of named entries name by name; null drops
    what is below, and a `Replace` takes its place.

    Raises:
        ValueError: a name that is not in the list, where the change is no whole entry with a kind of its own.
    """
    result = dict(below)
    for key, value in above.items():
        before = result.get(key)
        if value is None and before is not None:
            del result[key]
        elif isinstance(value, Mapping) and (before is None or isinstance(before, Mapping)):
            result[key] = merge(before or {}, value, where)
        elif isinstance(value, Mapping) and is_named_list(before):
            result[key] = merge_entries(before, value, f"{where}: {key}")
        else:
            result[key] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    """A value without `Replace` anywhere in it."""
    value = value.value if isinstance(value, Replace) else value
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def merge_entries(entries: list[Any], changes: Mapping[str, Any], where: str) -> list[Any]:
    """Named entries with changes by name: null takes one out, and a new name with a `kind` is put at the end."""
    found = by_name(entries)
    for name, change in changes.items():
        content = change.value if isinstance(change, Replace) else change
        if not isinstance(content, Mapping) or "kind" not in content:
            refuse_unknown([name], found, where)
        if change is None:
            del found[name]
        elif not isinstance(content, Mapping):
            raise ValueError(f"{where}.{name}: expected a mapping, got {change!r}")
        else:
            before = {"name": name} if isinstance(change, Replace) else found.get(name, {"name": name})
            found[name] = merge(before, _plain(change) if isinstance(change, Replace) else change, where)
    return [*found.values()]


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All values within mappings and lists of named entries, with their keys as `--set` takes them."""
    entries = by_name(values) if is_named_list(values) else values
    if isinstance(entries, Mapping) and entries:
        for key, value in entries.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, values


def sources_of(values: Any, source: str) -> dict[str, str]:
    return {key: source for key, _ in leaves(_plain(values))}


def merged_sources(below: Mapping[str, str], above: Any, source: str, merged: Mapping[str, Any]) -> dict[str, str]:
    """Where the values of a merge come from: those of `above` from `source`, and of `below` what is still there."""
    there = {key for key, _ in leaves(merged)}
    return {key: name for key, name in below.items() if key in there} | sources_of(above, source)


def build(kind: Any, values: Any, where: str) -> Any:
    """An instance of the dataclass `kind` from a mapping.

    Raises:
        ValueError: an unknown key or a value of a wrong type, with its place.
    """
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {values!r}")
    hints = typing.get_type_hints(kind)
    refuse_unknown(values, [entry.name for entry in dataclasses.fields(kind) if entry.name != "sources"], where)
    if kind is Recipe:
        _refuse_bad_stages(values.get("stages", []), where)
    given = {key: value for key, value in values.items() if value is not None}
    result = kind(**{key: convert(hints[key], value, f"{where}: {key}") for key, value in given.items()})
    if kind is Recipe:
        result.sources = sources_of(values, where)
    return result


def _refuse_bad_stages(stages: Any, where: str) -> None:
    """Raise ValueError where stages are no list of entries with a name of their own and a kind."""
    if isinstance(stages, Mapping):
        raise ValueError(
            f"{where}: stages: expected a list of stages, each with a name and a kind, got a mapping of "
            f"{', '.join(map(str, stages)) or 'nothing'}: that can only change stages of a recipe that is extended"
        )
    names = []
    for number, entry in enumerate(stages if isinstance(stages, list) else ()):
        place = f"{where}: stages, entry {number}"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{place}: expected a mapping, got {entry!r}")
        for key in ("name", "kind"):
            if not isinstance(entry.get(key), str) or not STAGE_NAME.fullmatch(entry[key]):
                raise ValueError(f"{place}: {key}={entry.get(key)!r}: expected a word of letters, digits, '_' and '-'")
        if entry["name"] in names:
            raise ValueError(f"{where}: stages: two are called {entry['name']!r}; give each a name of its own")
        names.append(entry["name"])


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` asks; YAML reads 1e-3 as a string, which a float takes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [argument for argument in arguments if argument is not type(None)]
        if len(options) > 1 or (value is None and len(options) < len(arguments)):
            return value
        return convert(options[0], value, where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if origin is dict and isinstance(value, Mapping):
        return {key: convert(arguments[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if origin is list and isinstance(value, list):
        return [convert(arguments[0], entry, f"{where}, entry {place}") for place, entry in enumerate(value)]
    expected = {dict: "a mapping", list: "a list", float: "a number", int: "int", str: "str", bool: "bool"}
    kind = origin or hint
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    if kind in expected and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise ValueError(f"{where}: expected {expected[kind]}, got {value!r}")
    return value


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ValueError for the first key that is not known, naming the nearest one that is, or all."""
    known = [*known]
    for key in given:
        if key not in known:
            suggestion, _, _ = nearest(str(key), known).partition(" Known are")
            raise ValueError(f"{where}: unknown key {key!r}; {suggestion}")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: before -> now` for all that differs between two recipes, operational keys left out."""
    lines = []
    for key in [*before, *(key for key in now if key not in before)]:
        if key in OPERATIONAL:
            continue
        old, new = before.get(key), now.get(key)
        if is_named_list(old) and is_named_list(new):
            old, new = by_name(old), by_name(new)
            common = [name for name in old if name in new]
            if common != [name for name in new if name in old]:
                lines.append(f"the order of {prefix}{key}: {', '.join(old)} -> {', '.join(new)}")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return lines
