"""A recipe's own held-out rows as items of a benchmark, and the few figures that runs are compared by."""

import contextlib
import dataclasses
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from medsight.data.sources import Source, iterate
from medsight.evaluation.benchmarks import load_benchmark
from medsight.evaluation.cases import Case
from medsight.evaluation.predictions import Prediction, Problems
from medsight.evaluation.readers import NoRowsError, read_cases
from medsight.evaluation.scored_run import protocol_of
from medsight.evaluation.scoring import score_rows
from medsight.evaluation.summary import summarise

from .corpus import Corpus


SPLITS = ("validation", "test")


def held_out_items(corpus: Corpus, benchmark: str, split: str = "validation") -> list[Case]:
    """The items of a benchmark that a recipe's data hold.

    Args:
        benchmark: a shipped benchmark of the layout biomedparse, such as "segmentation".
        split: "validation", the images of the training rows that no stage trains on; or "test".

    Raises:
        NoRowsError: there is no row.
        ValueError: the benchmark or a source has another layout, or two rows have one id.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
    declared = load_benchmark(benchmark)
    found: dict[str, Case] = {}
    for source in map(Source.from_mapping, corpus.recipe.data.regions):
        if {source.layout, declared.layout} != {"biomedparse"}:
            raise ValueError(
                f"benchmark {benchmark} reads the layout {declared.layout}, {source.path} has {source.layout}: "
                "expected biomedparse of both"
            )
        rows: Any = corpus.validation
        if split == "test":
            source = dataclasses.replace(source, split="test")
            rows = [item.row for item in iterate(source) if item.row is not None]
        images = {os.path.abspath(row["image"]["path"]) for row in rows}
        changes: dict[str, Any] = {"split": source.split, "files": ("*",)}
        declared = dataclasses.replace(declared, **changes)
        with contextlib.suppress(NoRowsError):  # whether the files are there was seen when they were read
            for item in read_cases(declared, source.path)[0]:
                path = os.path.abspath(item.images[0]["path"])
                if path in images:
                    if item.id in found and os.path.abspath(found[item.id].images[0]["path"]) != path:
                        raise ValueError(f"{source.path}: the row {item.id!r} is in two sources")
                    found[item.id] = item
    if not found:
        raise NoRowsError(f"benchmark {benchmark}: the recipe's data have no {split} row for it")
    return list(found.values())


def score_predictions(items: Sequence[Case], predictions: Sequence[Prediction], benchmark: str) -> dict[str, Any]:
    """What metrics.json would say of predictions, by the benchmark's own protocol."""
    declared = load_benchmark(benchmark)
    protocol = protocol_of(declared, None, None, {})
    by_id = {prediction.id: prediction for prediction in predictions}
    rows = score_rows(items, by_id, declared, protocol, Problems())
    return {"task": declared.task, **summarise(rows, declared)}


def figures(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a metrics.json by which runs are compared; None where no row has one.

    Returns:
        `dice`, the mean over rows; `dice_sets`, the unweighted mean over data sets; `no_mask`, the share of rows about
        something absent that are answered without a mask; of diagnoses, `recall` first.
    """
    dice, absent = metrics["scores"].get("dice"), metrics["negatives"]["no_region_rate"]
    sets = set_dice(metrics).values()
    found = {"recall": metrics["scores"]["answer"]["micro"]["value"]} if metrics["task"] == "diagnose" else {}
    return {
        **found,
        "dice": dice["micro"]["value"] if dice else None,
        "dice_sets": statistics.fmean(sets) if sets else None,
        "no_mask": absent["value"] if absent else None,
    }


def set_dice(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Mean Dice of each data set that has rows with something to find."""
    by_set = metrics["by"]["dataset"]
    return {name: entry["dice"]["value"] for name, entry in by_set.items() if entry.get("dice")}
