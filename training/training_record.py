"""What a run says of itself on a card, written whenever a stage ends: data and their licences, times, machines."""

import csv
import importlib.resources
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from medsight.checkpoint import read_json
from medsight.data.sources import Source, iterate

from .corpus import TEXT, Corpus, read_source
from .recipe import Recipe, is_named_list
from .run_folder import ENVIRONMENT_FILE, FINISHED_FILE, RECIPE_FILE, stage_folder, write_if_changed


RECORD_FILE = "training_record.json"
EMISSIONS = "emissions.csv"  # of codecarbon, where `report_to: codecarbon` asked for it
FEW_IMAGES = 20
NAMES = {"device": "device", "processes": "processes", "python": "Python", "torch": "torch"}


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


def write_record(run: Path, recipe: Recipe, corpus: Corpus) -> None:
    """Write RUN/training_record.json, where it is not there as it is now: `data` and `training`, a card's sections as
    Markdown; `datasets`, names for its header; and `emissions`, fields of the header's `co2_eq_emissions` or null.

    Raises:
        OSError: it cannot be written, or a record that it is made of cannot be read.
        ValueError: such a record is damaged.
    """
    sets = _read_sets(recipe, corpus)
    rows, held, emissions = len(corpus.training), len(corpus.validation), _emissions(run)
    record = {
        "datasets": sorted(sets),
        "emissions": emissions,
        "data": f"{rows:,} training images, {held:,} held out for validation.\n\n{_sets_table(sets)}",
        "training": _training_text(run, recipe.to_dict(), emissions),
    }
    write_if_changed(run / RECORD_FILE, record)


def _read_sets(recipe: Recipe, corpus: Corpus) -> dict[str, DataSet]:
    """The sets that a run reads, by name."""
    sets: dict[str, DataSet] = defaultdict(DataSet)
    for row in corpus.training.select_columns(["dataset", "masks", "label_origin"]):
        entry = sets[row["dataset"] or "unnamed"]
        entry.images += 1
        entry.masks += len(row["masks"])
        entry.origins[row["label_origin"] or "not stated"] += bool(row["masks"])
    reads_text = any(TEXT in stage.get("data", []) for stage in recipe.stages)
    texts = [read_source(recipe, source) for source in recipe.data.text] if reads_text else []
    spoken = [rows for split in corpus.conversations.values() for rows in split]
    for rows, words_only in [*((text, True) for text in texts), *((rows, False) for rows in spoken)]:
        for name, count in Counter(rows["dataset"]).items():
            entry = sets[name or "unnamed"]
            entry.conversations += count
            entry.words_only = words_only and not entry.images
    for source in map(Source.from_mapping, recipe.data.regions):
        for row in (entry.row for entry in iterate(source)):
            if row is not None and (row["dataset"] or "unnamed") in sets:
                entry = sets[row["dataset"] or "unnamed"]
                entry.licences.update(row["licences"])
                entry.sources.update(row["source_urls"])
    return dict(sets)


def _sets_table(sets: dict[str, DataSet]) -> str:
    file = importlib.resources.files("medsight.hub") / "datasets.yaml"
    known = yaml.safe_load(file.read_text(encoding="utf-8"))
    lines = ["| set | images | masks | masks made by | licence | credit |", "|---|---|---|---|---|---|"]
    pseudo = 0
    for name, entry in sorted(sets.items()):
        about, made = known.get(name, {}), []
        for origin, count in entry.origins.items():
            trusted = origin.startswith(("expert", "not stated"))
            pseudo += 0 if trusted else count
            made += [origin if trusted else f"{origin}: pseudo-labels"] if count else []
        images = f"{entry.images:,}" if entry.images else "words only" if entry.words_only else "-"
        cells = (
            f"{name} ({about['title']})" if about.get("title") else name,
            images + (f"; {entry.conversations:,} conversations" if entry.conversations else ""),
            f"{entry.masks:,}",
            ", ".join(made) or "-",
            "; ".join(sorted(entry.licences)) or about.get("licence", "not stated"),
            "; ".join([about.get("credit", "not stated"), *sorted(entry.sources)]),
        )
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    few = [name for name, entry in sorted(sets.items()) if 0 < entry.images < FEW_IMAGES]
    if few:
        lines += ["", f"Fewer than {FEW_IMAGES} images, so expect little there: {', '.join(few)}."]
    if pseudo:
        lines += ["", f"The masks of {pseudo:,} images are **pseudo-labels**: a program's output, not an expert's."]
    return "\n".join(lines)


def _training_text(run: Path, recipe: dict[str, Any], emissions: dict[str, Any] | None) -> str:
    chain = [*_runs_before(recipe), (run, recipe, None)]
    begun, rows, total = [], [], 0.0
    for number, (folder, settings, last) in enumerate(chain, start=1):
        model, title = settings["model"], "" if len(chain) == 1 else f"run {number}: "
        start = f"scratch (random weights, preset `{model['preset']}`)"
        if model["folder"]:
            start = f"run {number - 1}" if number > 1 else f"the checkpoint `{Path(model['folder']).name}`"
        machine = _machine(read_json(folder / ENVIRONMENT_FILE))
        begun.append(f"from {start}; seed {settings['seed']}; {machine}.")
        for name in _finished(folder, settings, last):
            finished = read_json(stage_folder(folder, name) / FINISHED_FILE)
            seconds = float(finished["metrics"]["train_runtime"])
            total += seconds
            rows.append(f"| {title}{name} | {_hours(seconds)} | {_machine(finished.get('environment', {}))} |")
    lines = [f"Started {begun[0]}"]
    if len(chain) > 1:
        lines = [f"* Run {number} started {text}" for number, text in enumerate(begun, start=1)]
    lines += ["", "| stage | hours:minutes | on |", "|---|---|---|", *rows, f"| together | {_hours(total)} | |"]
    lines += ["", "A stage that was interrupted counts from its last start.", ""]
    if emissions:
        of_last = "" if len(chain) == 1 else ", for the last run"
        lines.append(f"codecarbon estimated {emissions['emissions']:,} g of CO₂ equivalents{of_last}.")
    else:
        lines.append("Energy and carbon were not measured.")
    return "\n".join(lines)


def _runs_before(recipe: dict[str, Any]) -> list[tuple[Path, dict[str, Any], str | None]]:
    """The runs, oldest first, that led to the folder which a recipe starts from, as far as they are still there: the
    folder of each, its recipe, of whichever version, and the stage that was started from (None: the last)."""
    if not recipe["model"]["folder"]:
        return []
    start = Path(recipe["model"]["folder"]).absolute()
    # RUN/model, or RUN/stages/STAGE/model
    for run, last in ((start.parent, None), (start.parent.parent.parent, start.parent.name)):
        if (run / RECIPE_FILE).is_file():
            before = yaml.safe_load((run / RECIPE_FILE).read_text(encoding="utf-8"))
            return [*_runs_before(before), (run, before, last)]
    return []


def _finished(run: Path, recipe: dict[str, Any], last: str | None) -> list[str]:
    """The finished stages of a run in order, up to `last`."""
    names = sorted(path.parent.name for path in run.glob(f"stages/*/{FINISHED_FILE}"))
    if is_named_list(recipe["stages"]):
        names = [entry["name"] for entry in recipe["stages"] if entry["name"] in names]
    return names[: names.index(last) + 1] if last in names else names


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
