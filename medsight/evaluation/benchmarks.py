"""Benchmarks as small declarations: where the files are, how a row becomes a prompt, which protocol scores it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from medsight.data.registry import find_layout, layout_names
from medsight.text import nearest


DECLARATIONS = Path(__file__).with_name("benchmarks.yaml")
# What each task can ask of images with masks; of segmentation and diagnosis, the first where a benchmark names none.
INTENTS = {
    "vqa": ("is_there", "where_is", "modality", "site"),
    "segment": ("segment_one", "segment_several", "segment_all"),
    "diagnose": ("diagnose",),
}
# Read by `medsight.evaluation.readers`: files that only ever measure. Other layouts are those of the training data.
TEST_LAYOUTS = ("annotated", "diagseg", "mecovqa", "mmmu")
NEEDED_FIELDS = ("id", "question", "answer", "image", "masks")
OPTIONAL_FIELDS = ("target", "dataset", "modality", "site", "patient", "label_origin")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One declaration; benchmarks.yaml says what each field is for. A wrong one raises ValueError.

    Example:
        >>> segmentation = load_benchmark("segmentation")
        >>> segmentation.task, segmentation.layout, segmentation.chosen_intent()
        ('segment', 'biomedparse', 'segment_one')
    """

    name: str
    title: str
    task: str
    layout: str
    split: str
    files: Sequence[str]
    protocol: Mapping[str, str]
    prompt: str
    get: str
    intent: str | None = None
    expected_rows: int | None = None
    expected_shards: int | None = None
    notes: Sequence[str] = ()
    fields: Mapping[str, str | Sequence[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in INTENTS:
            raise ValueError(f"benchmark {self.name}: task {self.task!r}, expected one of {', '.join(INTENTS)}")
        layouts = (*layout_names(), *TEST_LAYOUTS)
        if self.layout not in layouts:
            raise ValueError(f"benchmark {self.name}: layout {self.layout!r}: {nearest(self.layout, layouts)}")
        if self.layout not in TEST_LAYOUTS and find_layout(self.layout).kind == "regions":
            self.chosen_intent()
        scored = {"vqa": ("answers",), "segment": ("masks",), "diagnose": ("answers", "masks")}[self.task]
        check_names(f"benchmark {self.name}: protocol", self.protocol, scored)
        fields = (NEEDED_FIELDS, OPTIONAL_FIELDS) if self.layout == "diagseg" else ()
        check_names(f"benchmark {self.name}: fields of layout {self.layout}", self.fields, *fields)

    def chosen_intent(self) -> str:
        """What is asked of images with masks.

        Raises:
            ValueError: the task cannot ask that; a vqa task has to say what it asks.
        """
        known = INTENTS[self.task]
        intent = known[0] if self.intent is None and self.task != "vqa" else self.intent
        if intent not in known:
            raise ValueError(
                f"benchmark {self.name}: intent {intent!r} of a {self.task} task: expected one of {', '.join(known)}"
            )
        return str(intent)

    @property
    def has_masks(self) -> bool:
        """Whether rows have reference masks."""
        return self.task != "vqa"

    def files_in(self, path: Path) -> list[Path]:
        """The benchmark's files in a folder; or the path itself, if it is a file.

        Raises:
            FileNotFoundError: none is there; the one line says what to download, from where, into which folder.
        """
        files = [path] if path.is_file() else sorted({file for name in self.files for file in path.glob(name)})
        if not files:
            raise FileNotFoundError(
                f"benchmark {self.name}: {path} holds none of its files; get {self.get}, into {path}"
            )
        return files


def check_names(what: str, given: Iterable[str], needed: Sequence[str] = (), optional: Sequence[str] = ()) -> None:
    """Raises ValueError, naming them, where names are missing or unknown."""
    unknown, missing = set(given) - {*needed, *optional}, set(needed) - set(given)
    if unknown or missing:
        wrong = f"unknown {', '.join(sorted(unknown))}" if unknown else f"missing {', '.join(sorted(missing))}"
        raise ValueError(f"{what}: {wrong}; expected {', '.join((*needed, *optional)) or 'none'}")


def load_benchmark(name: str) -> Benchmark:
    """A shipped benchmark by its name, or the only one that a YAML file declares; a wrong one raises ValueError."""
    if name.endswith((".yaml", ".yml")):
        declared = load_declarations(Path(name))
        if len(declared) != 1:
            raise ValueError(f"{name}: expected one benchmark, found {len(declared)} ({', '.join(declared)})")
        return next(iter(declared.values()))
    declared = load_declarations()
    if name not in declared:
        raise ValueError(
            f"benchmark {name!r} is unknown: {nearest(name, declared)}; or name a YAML file that declares one"
        )
    return declared[name]


def load_declarations(path: Path = DECLARATIONS) -> dict[str, Benchmark]:
    """All benchmarks that a file declares, by name; `like: NAME` takes from a shipped one what an entry leaves out."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise ValueError(f"{path}: expected benchmark names, each with a mapping")
    fields = [field for field in dataclasses.fields(Benchmark) if field.name != "name"]
    needed = [field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING]
    declared = {}
    for name, entry in content.items():
        place = f"{path}: benchmark {name}"
        if "like" in entry:
            entry = _completed(entry, place)
        check_names(place, entry, needed, [field.name for field in fields if field.name not in needed])
        declared[str(name)] = Benchmark(name=str(name), **entry)
    return declared


def _completed(entry: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A declaration with what it takes from the shipped one that it is `like`; of `fields` each by itself."""
    shipped = load_declarations()
    if entry["like"] not in shipped:
        raise ValueError(f"{place}: like {entry['like']!r}: {nearest(entry['like'], shipped)}")
    base = vars(shipped[entry["like"]])
    completed = {**base, **entry, "fields": {**base["fields"], **dict(entry.get("fields", {}))}}
    return {key: value for key, value in completed.items() if key not in ("name", "like")}


def check_counts(benchmark: Benchmark, rows: int, files: int, allow: bool) -> list[str]:
    """What to say of a number of rows or files that is not the known one; raises ValueError unless it is allowed."""
    found = [(rows, benchmark.expected_rows, "rows"), (files, benchmark.expected_shards, "files")]
    wrong = [f"{n:,} {what} where {known:,} are expected" for n, known, what in found if known not in (None, n)]
    if not wrong:
        return []
    counted = f"benchmark {benchmark.name}: {' and '.join(wrong)}"
    if not allow:
        raise ValueError(
            f"{counted}, so scores would not be comparable; get the whole set, or say --allow-row-count to score it "
            "with a note"
        )
    return [f"{counted}: not comparable with published scores"]
