"""metrics.json: means of rows' scores with bootstrap intervals, by data set, modality and target."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from medsight.metrics import load
from medsight.metrics.intervals import Interval, bootstrap_interval

from .benchmarks import Benchmark


DIGITS = 6
NO_CODE = "no code"
Row = Mapping[str, Any]
Entry = TypeVar("Entry")
_ANSWERS = {"answer": None, "closed_accuracy": "CLOSED", "open_recall": "OPEN"}  # by the kind of questions
_MASK_SCORES = ("dice", "iou", "hd95_mm", "surface_dice", "code_accuracy", "group_accuracy")
SCORES = (*_ANSWERS, *_MASK_SCORES)
TASK_SCORES = {"vqa": tuple(_ANSWERS), "segment": _MASK_SCORES, "diagnose": ("answer", *_MASK_SCORES)}
BY = {
    "vqa": ("dataset", "modality", "site", "answer_type"),
    "segment": ("modality", "dataset", "target"),
    "diagnose": ("modality", "dataset", "reference"),
}


def value_of(row: Row, score: str) -> float | None:
    """A row's value of a score: one of an answer, or a field of the row; None where the row has none."""
    if score not in _ANSWERS:
        return row.get(score)
    return row.get("answer_score") if _ANSWERS[score] in (None, row["answer_type"]) else None


def estimate(rows: Sequence[Row], score: str, seed: int, macro_by: str | None = None) -> dict[str, Any] | None:
    """A mean over rows (or the unweighted mean over groups of them) with its 95% bootstrap interval.

    Returns:
        `value`, `low` and `high` (None where nothing varies), `n` rows, `units` that the interval draws; None where no
        row has the score.
    """
    scored = [(row, value) for row in rows if (value := value_of(row, score)) is not None]
    if not scored:
        return None
    groups = [str(row[macro_by]) for row, _ in scored] if macro_by else None
    units = [unit_of(row) for row, _ in scored]
    value, low, high = rounded(bootstrap_interval([value for _, value in scored], groups, units, seed=seed))
    return {"value": value, "low": low, "high": high, "n": len(scored), "units": len(set(units))}


def rounded(interval: Interval) -> tuple[float | None, ...]:
    """A value and the ends of its interval, as they are written."""
    return tuple(None if end is None else round(end, DIGITS) for end in interval)


def unit_of(row: Row) -> str:
    """What is drawn together with a row for intervals: all rows of its `Case.patient`; the row alone without one."""
    return json.dumps([row["dataset"], row["patient"]] if row["patient"] else [row["id"]])


def interval_unit(rows: Iterable[Row]) -> str:
    """What intervals draw, in words."""
    named = {bool(row["patient"]) for row in rows}
    words = {True: "patient or image", False: "row"}
    return words[named.pop()] if len(named) == 1 else "patient, image, or row where neither is named"


def summarise(
    rows: Sequence[Row], benchmark: Benchmark, seed: int = 0, codes_per_group: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """All figures of metrics.json that follow from the rows' scores; with the codebook's size, where it is known."""
    names = [name for name in TASK_SCORES[benchmark.task] if any(value_of(row, name) is not None for row in rows)]
    scores = {
        name: {"micro": estimate(rows, name, seed), "macro": estimate(rows, name, seed, macro_by="modality")}
        for name in names
    }
    by: dict[str, dict[str, Any]] = {}
    for field in BY[benchmark.task]:
        by[field] = {
            value: {"n": len(inside)} | {name: found for name in names if (found := estimate(inside, name, seed))}
            for value, inside in grouped(rows, (row[field] for row in rows))
        }
    result: dict[str, Any] = {
        "n": len(rows),
        "patients": len({(row["dataset"], row["patient"]) for row in rows if row["patient"]}) or None,
        "interval_unit": interval_unit(rows),
        "macro_over": "modality",
        "scores": scores,
        "by": by,
        "counts": {
            "closed": sum(row["answer_type"] == "CLOSED" for row in rows),
            "open": sum(row["answer_type"] == "OPEN" for row in rows),
            "by_modality": dict(Counter(row["modality"] for row in rows)),
            "label_origin": dict(Counter(row["label_origin"] or "unknown" for row in rows)),
            "cut": sum(row.get("is_complete") is False for row in rows),
        },
        "refused": {
            kind: dict(reasons)
            for kind in ("answer", "mask")
            if (reasons := Counter(row[f"{kind}_refused"] for row in rows if row.get(f"{kind}_refused")))
        },
    }
    if benchmark.has_masks:
        result |= _mask_figures(rows, seed, codes_per_group)
    if (groups := group_confusion(rows)) is not None:
        result["predicted_groups"] = groups
    return result


def group_confusion(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Which code group images of each modality and site are taken for; None without any group.

    `by` the "classifier", the model's own, over all rows, where every prediction says what it found; else by "cited
    codes", the group of the first code of an answer about something present, with "no code" for one without.
    """
    known = [row for row in rows if row["modality"] != "-"]
    classified = bool(known) and all(row.get("group") for row in known)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in known:
        origin = " ".join(part for part in (row["modality"], row["site"]) if part != "-")
        if classified:
            counts[origin][row["group"]] += 1
        elif "n_masks" in row and not row["absent"]:
            counts[origin][next((group for group in row["groups"] if group), NO_CODE)] += 1
    if not any(set(groups) - {NO_CODE} for groups in counts.values()):
        return None
    return {
        "by": "classifier" if classified else "cited codes",
        "counts": {origin: dict(sorted(groups.items())) for origin, groups in sorted(counts.items())},
    }


def grouped(rows: Iterable[Entry], keys: Iterable[Any]) -> list[tuple[str, list[Entry]]]:
    """Rows by their keys as text, in the order of these."""
    inside: dict[str, list[Entry]] = defaultdict(list)
    for row, key in zip(rows, keys, strict=True):
        inside[str(key)].append(row)
    return sorted(inside.items())


def _mask_figures(rows: Sequence[Row], seed: int, codes_per_group: Mapping[str, int] | None) -> dict[str, Any]:
    present = [row for row in rows if not row["absent"]]
    absent = [row for row in rows if row["absent"]]
    figures: dict[str, Any] = {
        "present": {
            "n": len(present),
            "no_region_rate": estimate(present, "no_region", seed),
            "masks_per_answer": _mean([row["n_masks"] for row in present]),
            "references_per_row": _mean([row["n_references"] for row in present]),
        },
        "negatives": {
            "n": len(absent),
            "no_region_rate": estimate(absent, "no_region", seed),
            "false_mask_rate": estimate(absent, "false_mask", seed),
        },
    }
    if any(row["codes"] for row in rows):
        figures["codes"] = _codes(rows, codes_per_group)
        without = [row for row in present if row["reference_codes"] is None]
        figures["reference_codes"] = {
            "from": dict(Counter(row["reference_codes_from"] for row in present if row["reference_codes_from"])),
            "unknown": len(without),
            "unknown_by_origin": dict(sorted(Counter(f"{row['modality']} {row['site']}" for row in without).items())),
            "group_unknown": sum(row["group"] is not None for row in without),
        }
    return figures


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), DIGITS) if values else None


def _codes(rows: Sequence[Row], codes_per_group: Mapping[str, int] | None) -> dict[str, Any]:
    """What region_codes says of the codes that the answers cite."""
    named = all(len(row["groups"]) == len(row["codes"]) and None not in row["groups"] for row in rows)
    found = load("region_codes").compute(
        predictions=[row["codes"] for row in rows],
        references=[row["reference_codes"] for row in rows],
        absent=[row["absent"] for row in rows],
        reference_counts=[None if row["absent"] else row["n_references"] for row in rows],
        structures=[None if row["absent"] else row["code_structures"] for row in rows],
        groups=[row["groups"] if named else None for row in rows],
        codes_per_group=dict(codes_per_group) if codes_per_group and named else None,
    )
    for name in ("false_mask_rate", "no_region_rate"):  # told of the masks themselves, not of their codes
        del found["answers"][name]
    return found
