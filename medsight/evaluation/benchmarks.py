"""Benchmarks as small declarations: where the files are, how a row becomes a prompt, which protocol scores it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from medsight.data.registry import find_layout, layout_names
from medsight.text import nearest


DECLARATIONS = Path(__file__).with_name("benchmarks.yaml")
# What each task can ask of images with masks; the first is meant where a benchmark of segmentation or diagnosis names
# none.
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
    """One declaration; benchmarks.yaml says what each field is for.

    Raises:
        ValueError: the task or the layout is unknown, the task's protocol is missing, or `fields` are not those that
            the layout needs.

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
        try:
            self._check()
        except ValueError as error:
            raise ValueError(f"benchmark {self.name}: {error}") from None

    def _check(self) -> None:
        if self.task not in INTENTS:
            raise ValueError(f"task {self.task!r}, expected one of {', '.join(INTENTS)}")
        if self.layout not in TEST_LAYOUTS:
            if self.layout not in layout_names():
                raise ValueError(f"layout {self.layout!r}: {nearest(self.layout, (*layout_names(), *TEST_LAYOUTS))}")
            if find_layout(self.layout).kind == "regions":
                self.chosen_intent()
        wanted = {"vqa": {"answers"}, "segment": {"masks"}, "diagnose": {"answers", "masks"}}[self.task]
        if set(self.protocol) != wanted:
            raise ValueError(
                f"a {self.task} task needs a protocol of {' and '.join(sorted(wanted))}, "
                f"got one of {', '.join(self.protocol) or 'nothing'}"
            )
        needed, optional = (NEEDED_FIELDS, OPTIONAL_FIELDS) if self.layout == "diagseg" else ((), ())
        missing, unknown = set(needed) - set(self.fields), set(self.fields) - {*needed, *optional}
        if missing or unknown:
            wrong = f"unknown {', '.join(sorted(unknown))}" if unknown else f"missing {', '.join(sorted(missing))}"
            expected = ", ".join((*needed, *optional)) or "none"
            raise ValueError(f"fields: {wrong}; layout {self.layout} takes {expected}")

    def chosen_intent(self) -> str:
        """What is asked of images with masks.

        Raises:
            ValueError: the task cannot ask that; a vqa task has to say what it asks.
        """
        known = INTENTS[self.task]
        intent = known[0] if self.intent is None and self.task != "vqa" else self.intent
        if intent not in known:
            raise ValueError(f"intent {self.intent!r} of a {self.task} task: expected one of {', '.join(known)}")
        return str(intent)

    @property
    def has_masks(self) -> bool:
        """Whether rows have reference masks."""
        return self.task != "vqa"

    def check_present(self, path: Path) -> None:
        """Makes sure that the files are there.

        Raises:
            FileNotFoundError: none of them is; the one line says what to download, from where, into which folder.
        """
        if path.is_file() or any(next(path.glob(pattern), None) is not None for pattern in self.files):
            return
        raise FileNotFoundError(f"benchmark {self.name}: {path} holds none of its files; get {self.get}, into {path}")


def load_benchmark(name: str) -> Benchmark:
    """A shipped benchmark by its name, or the only one that a YAML file declares.

    Raises:
        OSError: the file cannot be read.
        ValueError: no benchmark has that name, or a declaration is wrong; the message names it.
    """
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
    """All benchmarks that a file declares, by name; `like: NAME` takes from a shipped one what an entry leaves out.

    Raises:
        OSError, ValueError: see `load_benchmark`.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise ValueError(f"{path}: expected benchmark names, each with a mapping")
    known = {field.name: field for field in dataclasses.fields(Benchmark) if field.name != "name"}
    needed = [name for name, field in known.items() if {field.default, field.default_factory} == {dataclasses.MISSING}]
    declared = {}
    for name, entry in content.items():
        entry = _completed(entry, path, name)
        unknown = sorted(set(entry) - set(known))
        missing = sorted(set(needed) - set(entry))
        if unknown or missing:
            wrong = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
            raise ValueError(f"{path}: benchmark {name}: {wrong}; the keys are {', '.join(known)}")
        declared[str(name)] = Benchmark(name=str(name), **entry)
    return declared


def _completed(entry: Mapping[str, Any], path: Path, name: str) -> dict[str, Any]:
    """A declaration with what it takes from the shipped one that it is `like`; of `fields` each by itself."""
    if "like" not in entry:
        return dict(entry)
    shipped = load_declarations()
    if entry["like"] not in shipped:
        raise ValueError(f"{path}: benchmark {name}: like {entry['like']!r}: {nearest(entry['like'], shipped)}")
    base = {key: value for key, value in vars(shipped[entry["like"]]).items() if key != "name"}
    changed = {key: value for key, value in entry.items() if key != "like"}
    if isinstance(changed.get("fields"), Mapping):
        changed["fields"] = {**base["fields"], **changed["fields"]}
    return {**base, **changed}


def check_counts(benchmark: Benchmark, rows: int, files: int, allow: bool) -> str | None:
    """Holds the number of rows and files against what the benchmark is known to have.

    Args:
        allow: whether another number is let through.

    Returns:
        What to say in the output of a number that was let through; None where all is as expected.

    Raises:
        ValueError: the number is another one, and that is not allowed.
    """
    wrong = []
    if benchmark.expected_rows not in (None, rows):
        wrong.append(f"{rows:,} rows where {benchmark.expected_rows:,} are expected")
    if benchmark.expected_shards not in (None, files):
        wrong.append(f"{files} files where {benchmark.expected_shards} are expected")
    if not wrong:
        return None
    found = f"benchmark {benchmark.name}: {' and '.join(wrong)}"
    if not allow:
        raise ValueError(
            f"{found}, so scores would not be comparable; get the whole set, or say --allow-row-count to score it "
            "with a note"
        )
    return f"{found}: not comparable with published scores"
