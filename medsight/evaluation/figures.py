"""The figures of metrics.json in words, as the terminal, the report and a model's card have them."""

from collections.abc import Mapping
from typing import Any

from medsight.text import align, first_few


METRICS, ROWS, REPORT = "metrics.json", "scores.jsonl", "report.html"  # in the output folder of an evaluation
FEW_ROWS = 10  # a mean over fewer is hardly a figure
LABELS = {
    "answer": "All questions",
    "closed_accuracy": "Closed accuracy",
    "open_recall": "Open recall",
    "dice": "Dice",
    "iou": "IoU",
    "hd95_mm": "HD95 (mm)",
    "surface_dice": "Surface Dice",
    "code_accuracy": "Right codes",
    "group_accuracy": "Codes of the right group",
}


def label(metrics: Mapping[str, Any], score: str) -> str:
    """What a score is called in a task."""
    return "Diagnosis (recall)" if score == "answer" and metrics["task"] == "diagnose" else LABELS[score]


def main_score(metrics: Mapping[str, Any]) -> str:
    """The score that a task is judged by first."""
    return "dice" if "dice" in metrics["scores"] else "answer"


def protocol_text(metrics: Mapping[str, Any]) -> str:
    """The protocol in a few words."""
    protocol = metrics["protocol"]
    parts = [protocol["answers"]] if "answers" in protocol else []
    if "masks" in protocol:
        flags = ", ".join(f"{name} {value}" for name, value in protocol["mask_flags"].items())
        parts.append(f"{protocol['masks']} ({flags})")
    return "; ".join(parts)


def figures_text(metrics: Mapping[str, Any]) -> str:
    """The main figures for a terminal."""
    lines = [("", "micro", "95%", "macro", "95%", "rows")]
    for name, both in metrics["scores"].items():
        figures = (*number_and_range(name, both["micro"]), *number_and_range(name, both["macro"]))
        lines.append((label(metrics, name), *figures, f"{both['micro']['n']:,}"))
    for title, figure in rates(metrics):
        lines.append((title, *number_and_range("rate", figure), "", "", f"{figure['n']:,}"))
    head = f"{metrics['title']}: {metrics['system']}, {row_count(metrics)}, protocol {protocol_text(metrics)}"
    return f"{head}\n\n{align(lines)}" + "".join(f"\nnote: {note}" for note in notes_of(metrics))


def rates(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """How often there was a mask and there should be none, or none and there should be: titles and figures."""
    if "negatives" not in metrics:
        return []
    found = [
        ("No mask where there is one", metrics["present"]["no_region_rate"]),
        ("No mask where there is none", metrics["negatives"]["no_region_rate"]),
        ("False mask", metrics["negatives"]["false_mask_rate"]),
    ]
    return [(title, figure) for title, figure in found if figure is not None]


def number_and_range(score: str, figure: Mapping[str, Any]) -> tuple[str, str]:
    """A figure and its interval, "–" where it has none; in percent, but for millimetres."""
    scale = 1 if score.endswith("_mm") else 100
    if figure["low"] is None:
        return f"{scale * figure['value']:.1f}", "–"
    value, low, high = (f"{scale * figure[end]:.1f}" for end in ("value", "low", "high"))
    return value, f"{low}–{high}"


def row_count(metrics: Mapping[str, Any]) -> str:
    """How many rows, and patients where they are named."""
    patients = f" of {metrics['patients']:,} patients or images" if metrics.get("patients") else ""
    return f"{metrics['n']:,} rows{patients}"


def has_modalities(metrics: Mapping[str, Any]) -> bool:
    """Whether there are modalities to take a macro mean over."""
    return len(metrics["counts"]["by_modality"]) > 1


def notes_of(metrics: Mapping[str, Any], name_rows: bool = True) -> list[str]:
    """What qualifies the figures, a sentence each; a row's name may be a patient's, so not all readers may see it."""
    notes = list(metrics["notes"])
    right = metrics.get("reference_codes")
    if right is not None and right["unknown"]:
        origins = first_few(list(right["unknown_by_origin"]))
        why = f"no code group of the model is called like their modality and site ({origins})"
        if right["group_unknown"] != right["unknown"]:
            why = "neither the data nor the predictions name them"
        notes.append(f"The right codes of {right['unknown']:,} rows are not known: {why}.")
    if cut := metrics["counts"].get("cut"):
        notes.append(f"{cut:,} answers were cut at the limit of length, and scored as they stood there.")
    for kind, reasons in metrics["refused"].items():
        for reason, count in reasons.items():
            notes.append(f"{count:,} {'answers' if kind == 'answer' else 'rows'} without a score: {reason}.")
    for kind, found in metrics["problems"].items():
        named = f" ({first_few(found['rows'])})" if name_rows else ""
        notes.append(f"{found['count']:,} predictions with a problem: {kind}{named}.")
    for origin, count in metrics["counts"]["label_origin"].items():
        if not origin.startswith(("expert", "unknown")):
            notes.append(f"The references of {count:,} rows are not an expert's: {origin}.")
    parts = [found for field in ("modality", "dataset") if len(found := metrics["by"].get(field, {})) > 1]
    few = {name: entry["n"] for part in parts for name, entry in part.items() if entry["n"] < FEW_ROWS}
    if few:
        listed = ", ".join(f"{name} ({count})" for name, count in few.items())
        notes.append(f"Fewer than {FEW_ROWS} rows, so hardly a figure: {listed}.")
    return notes
