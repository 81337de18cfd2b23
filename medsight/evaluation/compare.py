"""Two evaluations over the same rows: paired differences, with intervals."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from medsight.metrics.intervals import paired_difference
from medsight.text import align

from .figures import LABELS as SCORE_LABELS
from .figures import METRICS, ROWS
from .summary import BY, DIGITS, SCORES, grouped, interval_unit, unit_of


RATES: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "negatives_right": lambda row: float(row["no_region"]) if row.get("absent") and "no_region" in row else None,
}
LABELS = {"negatives_right": "No mask where there is none"}


def read_evaluation(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What `medsight evaluate` wrote: metrics.json, and the rows of scores.jsonl by id.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged.
    """
    if not (folder / METRICS).is_file() or not (folder / ROWS).is_file():
        raise FileNotFoundError(f"{folder} is no evaluation: it has no {METRICS} and {ROWS}; run medsight evaluate")
    try:
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        with (folder / ROWS).open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}: {METRICS} or {ROWS} is damaged ({error}); evaluate again") from error
    return metrics, {row["id"]: row for row in rows}


def compare(first: Path, second: Path, seed: int = 0) -> dict[str, Any]:
    """How much better the first evaluation is than the second, over the rows that both score.

    Args:
        seed: of the bootstrap, which draws patients with all pairs of their rows; pairs where no patient is named.

    Returns:
        `a`, `b` (names), `benchmark`, `protocol`, `n`, `interval_unit`; `scores` {score: {a, b, difference, low, high,
        n, units, better, equal, worse, unpaired}} where unpaired rows have a score in one of the two alone; `macro`
        {score: the same over modalities}; `by` {field: {value: {score: ...}}}.

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
    values = SCORES | RATES
    present = [name for name in values if any(values[name](row) is not None for pair in pairs for row in pair)]
    result: dict[str, Any] = {
        "a": first_metrics["system"],
        "b": second_metrics["system"],
        **{name: first_metrics[name] for name in ("benchmark", "title", "protocol")},
        "n": len(pairs),
        "interval_unit": interval_unit(row for row, _ in pairs),
        "scores": {name: found for name in present if (found := difference(pairs, values[name], seed))},
        "macro": {name: found for name in present if (found := difference(pairs, values[name], seed, "modality"))},
        "by": {},
        "bootstrap": {"samples": 1000, "level": 0.95, "seed": seed},
    }
    for field in BY[first_metrics["task"]]:
        result["by"][field] = {
            value: {name: found for name in present if (found := difference(inside, values[name], seed))}
            for value, inside in grouped(pairs, [a[field] for a, _ in pairs])
        }
    return result


def difference(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    value: Callable[[Mapping[str, Any]], float | None],
    seed: int,
    macro_by: str | None = None,
) -> dict[str, Any] | None:
    """The paired difference of one score; None where no row has it in both."""
    scored = [(value(a), value(b), str(a[macro_by]) if macro_by else "", unit_of(a)) for a, b in pairs]
    both = [entry for entry in scored if None not in entry[:2]]
    if not both:
        return None
    a, b, groups, units = (list(column) for column in zip(*both, strict=True))
    chosen: dict[str, Any] = {"groups": groups, "statistic": "macro"} if macro_by else {}
    found = paired_difference(a, b, units=units, seed=seed, **chosen)
    return {
        "a": round(_mean(a, groups), DIGITS),
        "b": round(_mean(b, groups), DIGITS),
        "difference": round(found.value, DIGITS),
        "low": None if found.low is None else round(found.low, DIGITS),
        "high": None if found.high is None else round(found.high, DIGITS),
        "n": len(both),
        "better": sum(x > y for x, y in zip(a, b, strict=True)),
        "equal": sum(x == y for x, y in zip(a, b, strict=True)),
        "worse": sum(x < y for x, y in zip(a, b, strict=True)),
        "units": len(set(units)),
        "unpaired": sum((x is None) != (y is None) for x, y, _, _ in scored),
    }


def _mean(values: Sequence[float], groups: Sequence[str]) -> float:
    """The unweighted mean over groups of the means within them; one group gives the mean."""
    return fmean(fmean(inside) for _, inside in grouped(values, groups))


def comparison_text(result: Mapping[str, Any]) -> str:
    """The differences as a table for a terminal; those whose interval leaves out 0 are marked."""
    labels = {**SCORE_LABELS, **LABELS}
    lines: list[tuple[str, ...]] = [("", "A", "B", "A - B", "95%", "", "better", "equal", "worse", "rows")]
    for kind, scores in (("micro", result["scores"]), ("macro", result["macro"])):
        for name, found in scores.items():
            scale = 1 if name.endswith("_mm") else 100
            if kind == "macro" and name == "negatives_right":
                continue
            ends = [found["low"], found["high"]]
            spread = "–" if None in ends else " to ".join(f"{scale * end:+.1f}" for end in ends)
            clear = None not in ends and (ends[0] > 0 or ends[1] < 0)
            lines.append(
                (
                    f"{labels[name]}, {kind}",
                    f"{scale * found['a']:.1f}",
                    f"{scale * found['b']:.1f}",
                    f"{scale * found['difference']:+.1f}",
                    spread,
                    "*" if clear else "",
                    *(f"{found[key]:,}" for key in ("better", "equal", "worse", "n")),
                )
            )
    unpaired = max((found["unpaired"] for found in result["scores"].values()), default=0)
    head = f"{result['title']}: A = {result['a']}, B = {result['b']}, {result['n']:,} rows"
    note = f"\n* the 95% interval, drawn by {result['interval_unit']}, leaves out 0. "
    note += "Better and worse: rows where A has the higher and the lower figure."
    if unpaired:
        note += f"\n{unpaired:,} rows have a score in one of the two alone, and are left out of that line."
    return f"{head}\n\n{align(lines)}\n{note}"
