"""Two evaluations over the same rows: paired differences, with intervals."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from medsight.checkpoint import read_json
from medsight.metrics.intervals import bootstrap_interval
from medsight.text import align

from .figures import LABELS as SCORE_LABELS
from .figures import METRICS, ROWS
from .summary import BY, DIGITS, SCORES, Row, grouped, interval_unit, rounded, unit_of, value_of


LABELS = {**SCORE_LABELS, "negatives_right": "No mask where there is none"}


def read_evaluation(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What `medsight evaluate` wrote: metrics.json, and the rows of scores.jsonl by id."""
    if not (folder / METRICS).is_file() or not (folder / ROWS).is_file():
        raise FileNotFoundError(f"{folder} is no evaluation: it has no {METRICS} and {ROWS}; run medsight evaluate")
    with (folder / ROWS).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return read_json(folder / METRICS), {row["id"]: row for row in rows}


def compare(first: Path, second: Path, seed: int = 0) -> dict[str, Any]:
    """How much higher the second evaluation is than the first, over the rows of both: intervals draw pairs of rows.

    Returns:
        `a`, `b` (names), `benchmark`, `title`, `protocol`, `n`, `interval_unit`; `scores` {score: {a, b, difference,
        low, high, n, units, better, equal, worse, unpaired}} where unpaired rows have a score in one of the two alone;
        `macro` {score: the same over modalities}; `by` {field: {value: {score: ...}}}.

    Raises:
        OSError: a folder is no evaluation.
        ValueError: the two are of different benchmarks, data, prompts or protocols.
    """
    (first_metrics, rows_a), (second_metrics, rows_b) = read_evaluation(first), read_evaluation(second)
    for name, a, b in (
        ("benchmarks", first_metrics["benchmark"], second_metrics["benchmark"]),
        ("protocols", first_metrics["protocol"], second_metrics["protocol"]),
        ("data or prompts", first_metrics["run"]["data"]["sha256"], second_metrics["run"]["data"]["sha256"]),
    ):
        if a != b:
            raise ValueError(f"{first} and {second} are evaluations of different {name}: {a} and {b}")
    if set(rows_a) != set(rows_b):
        raise ValueError(f"{first} and {second} do not have the same rows; evaluate again")
    pairs = [(rows_a[identity], rows_b[identity]) for identity in rows_a]
    return {
        "a": first_metrics["system"],
        "b": second_metrics["system"],
        **{name: first_metrics[name] for name in ("benchmark", "title", "protocol")},
        "n": len(pairs),
        "interval_unit": interval_unit(row for row, _ in pairs),
        "scores": differences(pairs, seed),
        "macro": differences(pairs, seed, "modality"),
        "by": {
            field: {value: differences(inside, seed) for value, inside in grouped(pairs, [a[field] for a, _ in pairs])}
            for field in BY[first_metrics["task"]]
        },
        "bootstrap": {"samples": 1000, "level": 0.95, "seed": seed},
    }


def differences(pairs: Sequence[tuple[Row, Row]], seed: int, macro_by: str | None = None) -> dict[str, Any]:
    """The paired difference of each score that some row has in both, over rows or over groups of them."""
    found = {}
    for name in (*SCORES, "negatives_right"):
        scored = [(_value(a, name), _value(b, name), a) for a, b in pairs]
        both = [(a, b, row) for a, b, row in scored if a is not None and b is not None]
        if not both:
            continue
        first, second, rows = (list(column) for column in zip(*both, strict=True))
        groups, units = [str(row[macro_by]) if macro_by else "" for row in rows], [unit_of(row) for row in rows]
        by_row = [b - a for a, b, _ in both]
        gains = [-change for change in by_row] if name.endswith("_mm") else by_row  # a distance is better small
        difference, low, high = rounded(bootstrap_interval(by_row, groups, units, seed=seed))
        found[name] = {
            "a": round(_mean(first, groups), DIGITS),
            "b": round(_mean(second, groups), DIGITS),
            "difference": difference,
            "low": low,
            "high": high,
            "n": len(both),
            "better": sum(gain > 0 for gain in gains),
            "equal": gains.count(0),
            "worse": sum(gain < 0 for gain in gains),
            "units": len(set(units)),
            "unpaired": sum((a is None) != (b is None) for a, b, _ in scored),
        }
    return found


def _value(row: Row, score: str) -> float | None:
    if score == "negatives_right":
        return float(row["no_region"]) if row["absent"] and "no_region" in row else None
    return value_of(row, score)


def _mean(values: Sequence[float], groups: Sequence[str]) -> float:
    """The unweighted mean over groups of the means within them; one group gives the mean."""
    return fmean(fmean(inside) for _, inside in grouped(values, groups))


def comparison_text(result: Mapping[str, Any]) -> str:
    """The differences as a table for a terminal; those whose interval leaves out 0 are marked."""
    lines: list[tuple[str, ...]] = [("", "A", "B", "B - A", "95%", "", "better", "equal", "worse", "rows")]
    macro = {name: found for name, found in result["macro"].items() if name != "negatives_right"}
    for kind, scores in (("micro", result["scores"]), ("macro", macro)):
        for name, found in scores.items():
            scale = 1 if name.endswith("_mm") else 100
            a, b = scale * found["a"], scale * found["b"]
            spread, mark = "–", ""
            if found["low"] is not None:
                spread = f"{scale * found['low']:+.1f} to {scale * found['high']:+.1f}"
                mark = "*" if found["low"] > 0 or found["high"] < 0 else ""
            counts = [f"{found[key]:,}" for key in ("better", "equal", "worse", "n")]
            shown = (f"{a:.1f}", f"{b:.1f}", f"{scale * found['difference']:+.1f}")
            lines.append((f"{LABELS[name]}, {kind}", *shown, spread, mark, *counts))
    text = (
        f"{result['title']}: A = {result['a']}, B = {result['b']}, {result['n']:,} rows\n\n{align(lines)}\n\n"
        f"* the 95% interval, drawn by {result['interval_unit']}, leaves out 0. Better and worse: rows where B is."
    )
    if unpaired := max((found["unpaired"] for found in result["scores"].values()), default=0):
        text += f"\n{unpaired:,} rows have a score in one of the two alone, and are left out of that line."
    return text
