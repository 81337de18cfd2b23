"""What a training run's folder says for a card: which data, under which licences, for how long, on what."""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medsight.checkpoint import read_json


SETS_FILE = Path(__file__).with_name("datasets.yaml")
EMISSIONS = "emissions.csv"  # of codecarbon, where `report_to: codecarbon` asked for it
FEW_IMAGES = 20
NAMES = {"device": "device", "processes": "processes", "python": "Python", "torch": "torch"}


@dataclass
class Part:
    """A run of a chain, as far as its stage `last`: all of it, where there is none."""

    run: Path
    recipe: Any
    last: str | None = None


@dataclass
class DataSet:
    """One set of the training data.

    Attributes:
        images, masks, conversations: how many.
        words_only: whether its pictures were left out.
        origins: who made the masks -> how many images.
        licences, sources: as its rows state them.
    """

    images: int = 0
    masks: int = 0
    conversations: int = 0
    words_only: bool = False
    origins: Counter = field(default_factory=Counter)
    licences: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class TrainingRecord:
    """A card's sections on training.

    Attributes:
        data, training: Markdown.
        datasets: names of the sets, for the header; empty where they could not be read.
        emissions: fields of the header's `co2_eq_emissions`, where they were measured.
    """

    data: str
    training: str
    datasets: list[str]
    emissions: dict[str, Any] | None


def run_of(folder: Path) -> Path | None:
    """The run whose result a checkpoint folder is: the folder above it, if it is one."""
    above = folder.absolute().parent
    return above if folder.absolute().name == "model" and (above / "recipe.yaml").is_file() else None


def read_run(run: Path) -> TrainingRecord:
    """What a finished run recorded.

    Raises:
        OSError: it has no recipe, or a record is missing.
        ValueError: a record is damaged.
    """
    from medsight.training.recipe import load_recipe

    recipe = load_recipe(run / "recipe.yaml")
    rows = read_json(run / "data.json")
    total = f"{rows['training']['rows']:,} training images, {rows['validation']['rows']:,} held out for validation"
    emissions = _emissions(run)
    sets = None
    reason = "have changed since"
    try:
        sets = _read_sets(recipe, rows["training"]["sha256"])
    except (OSError, ValueError):  # whose message has paths, which are nobody else's business
        reason = "could not be read when this card was made"
    if sets is None:
        data = f"{total}. Their files {reason}, so their sets and licences are not listed here."
    else:
        data = f"{total}.\n\n{_sets_table(sets)}"
    return TrainingRecord(data, _training_text(run, recipe, emissions), sorted(sets or ()), emissions)


def _read_sets(recipe: Any, sha256: str) -> dict[str, DataSet] | None:
    """The sets of a recipe by name; None if they are not what was trained on."""
    from medsight.data.sources import Source, load_source
    from medsight.training.corpus import fingerprint, read_corpus

    corpus = read_corpus(recipe)
    if fingerprint(corpus.training) != sha256:
        return None
    sets: dict[str, DataSet] = defaultdict(DataSet)
    for row in corpus.training.select_columns(["dataset", "masks", "label_origin"]):
        one = sets[row["dataset"] or "unnamed"]
        one.images += 1
        one.masks += len(row["masks"])
        one.origins[row["label_origin"] or "not stated"] += bool(row["masks"])
    for entries, words_only in ((recipe.data.text, True), (recipe.data.conversations.values(), False)):
        for entry in entries:
            for name, count in Counter(load_source(Source.from_mapping(entry))["dataset"]).items():
                one = sets[name or "unnamed"]
                one.conversations += count
                one.words_only = words_only and not one.images
    _state_licences(sets, [Source.from_mapping(entry) for entry in recipe.data.regions])
    return dict(sets)


def _state_licences(sets: dict[str, DataSet], sources: Iterable[Any]) -> None:
    """Licences and addresses that the manifests of the region sources state."""
    from medsight.data.biomedparse import biomedparse_shards
    from medsight.data.records import json_records
    from medsight.data.splits import canonical_split

    for source in sources:
        shards = biomedparse_shards(source) if source.layout == "biomedparse" else []
        for shard in map(Path, shards):
            for _, record in json_records(shard) if shard.is_file() else ():
                if not isinstance(record, dict) or source.split not in (None, canonical_split(record["split"])):
                    continue
                parts = Path(record["image"]).parts
                one = sets.get(parts[0] if len(parts) > 2 else shard.absolute().parent.name)
                if one is not None and record.get("licence"):
                    unverified = ", not verified at the source" if record.get("tier") == "B" else ""
                    one.licences.add(f"{record['licence']}{unverified}")
                if one is not None and record.get("source_url"):
                    one.sources.add(record["source_url"])


def _sets_table(sets: dict[str, DataSet]) -> str:
    import yaml

    known = yaml.safe_load(SETS_FILE.read_text(encoding="utf-8"))
    lines = ["| set | images | masks | masks made by | licence | credit |", "|---|---|---|---|---|---|"]
    pseudo = 0
    for name, one in sorted(sets.items()):
        about = known.get(name, {})
        licence = "; ".join(sorted(one.licences)) or about.get("licence", "not stated")
        credit = "; ".join([about.get("credit", "not stated"), *sorted(one.sources)])
        made = ", ".join(_origin(origin) for origin, count in one.origins.items() if count) or "-"
        pseudo += sum(count for origin, count in one.origins.items() if _is_pseudo(origin))
        images = f"{one.images:,}" if one.images else "words only" if one.words_only else "-"
        if one.conversations:
            images += f"; {one.conversations:,} conversations"
        title = about.get("title", "")
        cells = (f"{name} ({title})" if title else name, images, f"{one.masks:,}", made, licence, credit)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    few = [name for name, one in sorted(sets.items()) if 0 < one.images < FEW_IMAGES]
    if few:
        lines += ["", f"Fewer than {FEW_IMAGES} images, so expect little there: {', '.join(few)}."]
    if pseudo:
        lines += [
            "",
            f"The masks of {pseudo:,} images are **pseudo-labels**: another program's output, not an expert's.",
        ]
    return "\n".join(lines)


def _is_pseudo(origin: str) -> bool:
    return not origin.startswith(("expert", "not stated"))


def _origin(origin: str) -> str:
    return f"{origin}: pseudo-labels" if _is_pseudo(origin) else origin


def _training_text(run: Path, recipe: Any, emissions: dict[str, Any] | None) -> str:
    chain = [*_runs_before(recipe), Part(run, recipe)]
    begun = [_beginning(part, number) for number, part in enumerate(chain)]
    lines = [f"Started from {begun[0]}"]
    if len(chain) > 1:
        lines = [f"* Run {number} started from {text}" for number, text in enumerate(begun, start=1)]
    lines += ["", "| stage | hours:minutes | on |", "|---|---|---|"]
    total = 0.0
    for number, part in enumerate(chain, start=1):
        for path in sorted(part.run.glob("stages/*/finished.json")):
            name = path.parent.name
            if part.last is not None and name > part.last:
                continue
            finished = read_json(path)
            seconds = float(finished["metrics"]["train_runtime"])
            total += seconds
            name = name if len(chain) == 1 else f"run {number}: {name}"
            lines.append(f"| {name} | {_hours(seconds)} | {_machine(finished.get('environment', {}))} |")
    lines += [f"| together | {_hours(total)} | |", "", "A stage that was interrupted counts from its last start.", ""]
    if emissions:
        of_last = "" if len(chain) == 1 else ", for the last run"
        lines.append(f"codecarbon estimated {emissions['emissions']:,} g of CO₂ equivalents{of_last}.")
    else:
        lines.append("Energy and carbon were not measured.")
    return "\n".join(lines)


def _runs_before(recipe: Any) -> list[Part]:
    """The runs, oldest first, that led to the folder which a recipe starts from, as far as they are still there."""
    from medsight.training.recipe import load_recipe

    start = Path(recipe.model.folder).absolute() if recipe.model.folder else None
    if start is None:
        return []
    # RUN/model, or RUN/stages/STAGE/model
    for run, last in ((start.parent, None), (start.parent.parent.parent, start.parent.name)):
        if (run / "recipe.yaml").is_file():
            before = load_recipe(run / "recipe.yaml")
            return [*_runs_before(before), Part(run, before, last)]
    return []


def _beginning(part: Part, before: int) -> str:
    """What a run began with, where `before` runs led to it, and on what it ran first."""
    recipe = part.recipe
    start = f"nothing (random weights, preset `{recipe.model.preset}`)"
    if recipe.model.folder:
        start = f"run {before}" if before else f"the checkpoint `{Path(recipe.model.folder).name}`"
    return f"{start}; seed {recipe.seed}; {_machine(read_json(part.run / 'environment.json'))}."


def _machine(environment: dict[str, Any]) -> str:
    return ", ".join(f"{label} {environment[name]}" for name, label in NAMES.items() if environment.get(name))


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02}"


def _emissions(run: Path) -> dict[str, Any] | None:
    """The sum of all codecarbon records, in grams; None where a run has none."""
    files = sorted(run.rglob(EMISSIONS))
    if not files:
        return None
    kilograms = 0.0
    for file in files:
        with open(file, encoding="utf-8", newline="") as lines:
            try:
                kilograms += sum(float(row["emissions"]) for row in csv.DictReader(lines))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{file} is no record of codecarbon: its column 'emissions' is bad ({error})"
                ) from error
    return {"emissions": round(1000 * kilograms, 1), "source": "codecarbon", "training_type": "training"}
