"""report.html: one self-contained page, with nothing to fetch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medsight import __version__
from medsight.evaluation.items import Item
from medsight.evaluation.predictions import Prediction
from medsight.evaluation.report_cases import choose_cases
from medsight.evaluation.report_codes import code_usage, confusion


TEMPLATE = Path(__file__).with_name("report.html.jinja")
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
FIELDS = {
    "modality": "modality",
    "dataset": "data set",
    "target": "target",
    "site": "body site",
    "answer_type": "answer type",
    "reference": "diagnosis",
}
Row = Mapping[str, Any]


def label(metrics: Mapping[str, Any], score: str) -> str:
    """What a score is called in a task."""
    return "Diagnosis (recall)" if score == "answer" and metrics["task"] == "diagnose" else LABELS[score]


def write_report(
    path: Path,
    metrics: Mapping[str, Any],
    rows: Sequence[Row],
    items: Sequence[Item],
    predictions: Mapping[str, Prediction],
) -> None:
    """Writes the page for the scores of one run.

    Args:
        metrics: the content of metrics.json.
        rows: of `score_rows`.
        items, predictions: that the rows are about, for the pictures.

    Raises:
        OSError, ValueError: a picture of a case cannot be read.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=metrics["title"],
        system=metrics["system"],
        count=_count(metrics),
        protocol=protocol_text(metrics),
        cards=_cards(metrics),
        notes=_notes(metrics),
        charts=_charts(metrics),
        tables=_tables(metrics),
        table_caption=f"Small print: 95% bootstrap intervals, drawn by {metrics['interval_unit']}.",
        cases=choose_cases(main_score(metrics), rows, items, predictions),
        key=["reference", "answer"] if "negatives" in metrics else ["", "regions that the answer cites"],
        confusion=confusion(metrics),
        code_usage=code_usage(metrics),
        provenance=_provenance(metrics),
        version=__version__,
    )
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(page, encoding="utf-8")
    scratch.replace(path)


def main_score(metrics: Mapping[str, Any]) -> str:
    """The score that a task is judged by first."""
    return "dice" if "dice" in metrics["scores"] else "answer"


def protocol_text(metrics: Mapping[str, Any]) -> str:
    """The protocol in a few words."""
    protocol = metrics["protocol"]
    parts = [protocol["answers"]] if "answers" in protocol else []
    if "masks" in protocol:
        flags = protocol["mask_flags"]
        flags_text = ", ".join(f"{name} {value}" for name, value in flags.items())
        parts.append(f"{protocol['masks']} ({flags_text})")
    return "; ".join(parts)


def figures_text(metrics: Mapping[str, Any]) -> str:
    """The main figures for a terminal."""
    from medsight.console import align

    lines = [("", "micro", "95%", "macro", "95%", "rows")]
    for name, both in metrics["scores"].items():
        micro, macro = both["micro"], both["macro"]
        lines.append(
            (label(metrics, name), *_number_and_range(name, micro), *_number_and_range(name, macro), f"{micro['n']:,}")
        )
    for title, figure in _rates(metrics):
        lines.append((title, *_number_and_range("rate", figure), "", "", f"{figure['n']:,}"))
    head = f"{metrics['title']}: {metrics['system']}, {_count(metrics)}, protocol {protocol_text(metrics)}"
    notes = "".join(f"\nnote: {note}" for note in _notes(metrics))
    return f"{head}\n\n{align(lines)}{notes}"


def _rates(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    if "negatives" not in metrics:
        return []
    found = [
        ("No mask where there is one", metrics["present"]["no_region_rate"]),
        ("No mask where there is none", metrics["negatives"]["no_region_rate"]),
        ("False mask", metrics["negatives"]["false_mask_rate"]),
    ]
    return [(title, figure) for title, figure in found if figure is not None]


def _number(score: str, value: float) -> str:
    return f"{value:.1f}" if score.endswith("_mm") else f"{100 * value:.1f}"


def _number_and_range(score: str, figure: Mapping[str, Any]) -> tuple[str, str]:
    if figure["low"] is None:
        return _number(score, figure["value"]), "–"
    return _number(score, figure["value"]), f"{_number(score, figure['low'])}–{_number(score, figure['high'])}"


def _count(metrics: Mapping[str, Any]) -> str:
    patients = f" of {metrics['patients']:,} patients or images" if metrics.get("patients") else ""
    return f"{metrics['n']:,} rows{patients}"


def _several(metrics: Mapping[str, Any]) -> bool:
    """Whether there are modalities to take a macro mean over."""
    return len(metrics["counts"]["by_modality"]) > 1


def _cards(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    cards = []
    main = main_score(metrics)
    for name, both in metrics["scores"].items():
        for kind in ("macro", "micro"):
            figure = both[kind]
            if kind == "macro" and (name != main or not _several(metrics)):
                continue
            value, spread = _number_and_range(name, figure)
            called = label(metrics, name)
            title = f"{called}, {kind}" if name == main and _several(metrics) else called
            over = " over modalities" if name == main and kind == "macro" else ""
            cards.append({"label": title, "value": value, "detail": f"95%: {spread} · {figure['n']:,} rows{over}"})
    for title, figure in _rates(metrics):
        value, spread = _number_and_range("rate", figure)
        cards.append({"label": title, "value": f"{value} %", "detail": f"95%: {spread} · {figure['n']:,} rows"})
    return cards


def _notes(metrics: Mapping[str, Any]) -> list[str]:
    notes = list(metrics["notes"])
    notes += _reference_notes(metrics)
    for kind, reasons in metrics["refused"].items():
        for reason, count in reasons.items():
            notes.append(f"{count:,} {'answers' if kind == 'answer' else 'rows'} without a score: {reason}.")
    for kind, found in metrics["problems"].items():
        some = ", ".join(found["rows"][:3]) + (", …" if found["count"] > 3 else "")
        notes.append(f"{found['count']:,} predictions with a problem: {kind} ({some}).")
    for origin, count in metrics["counts"]["label_origin"].items():
        if origin not in ("expert", "unknown"):
            notes.append(f"The references of {count:,} rows are not an expert's: {origin}.")
    few = [f"{name} ({count})" for name, count in metrics["counts"]["by_modality"].items() if count < 10]
    if few and _several(metrics):
        notes.append(f"Fewer than ten rows, so hardly a figure: {', '.join(few)}.")
    return notes


def _reference_notes(metrics: Mapping[str, Any]) -> list[str]:
    """Why cited codes of some rows were not held against right ones."""
    found = metrics.get("reference_codes")
    if found is None or not found["unknown"]:
        return []
    origins = list(found["unknown_by_origin"])
    some = ", ".join(origins[:3]) + (", …" if len(origins) > 3 else "")
    why = (
        f"no code group of the model is called like their modality and site ({some})"
        if found["group_unknown"] == found["unknown"]
        else "neither the data nor the predictions name them"
    )
    return [f"The right codes of {found['unknown']:,} rows are not known: {why}."]


def _charts(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    charts = []
    for name in ("dice", "answer"):
        if name not in metrics["scores"]:
            continue
        field = next(
            (field for field, values in metrics["by"].items() if len(values) > 1 and field != "answer_type"), None
        )
        if field is None:
            continue
        entries = [(value, found[name], found["n"]) for value, found in metrics["by"][field].items() if name in found]
        entries.sort(key=lambda entry: (-entry[1]["value"], entry[0]))
        charts.append(
            {
                "title": f"{label(metrics, name)} by {FIELDS[field]}",
                "caption": f"Mean over rows, in percent, with its 95% interval, drawn by {metrics['interval_unit']}.",
                "bars": [_bar(name, value, figure) for value, figure, _ in entries],
            }
        )
    return charts


def _bar(score: str, name: str, figure: Mapping[str, Any]) -> dict[str, Any]:
    number, spread = _number_and_range(score, figure)
    ends = figure["low"] is not None
    return {
        "name": f"{name}",
        "value": round(100 * figure["value"], 2),
        "low": round(100 * figure["low"], 2) if ends else None,
        "width": round(100 * (figure["high"] - figure["low"]), 2) if ends else None,
        "text": f"{number} · n {figure['n']:,}",
    }


def _tables(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    means = ["micro", "macro"] if _several(metrics) else ["micro"]
    tables = [
        {
            "title": "overall",
            "open": True,
            "columns": ["", *means, "rows"],
            "rows": [
                [label(metrics, name), *(_cell(name, both[mean]) for mean in means), f"{both['micro']['n']:,}"]
                for name, both in metrics["scores"].items()
            ],
        }
    ]
    for field, values in metrics["by"].items():
        if len(values) < 2:
            continue
        scores = [name for name in metrics["scores"] if any(name in found for found in values.values())]
        tables.append(
            {
                "title": f"by {FIELDS[field]}",
                "open": field == "modality",
                "columns": [FIELDS[field], "rows", *(label(metrics, name) for name in scores)],
                "rows": [
                    [
                        value,
                        f"{found['n']:,}",
                        *(_cell(name, found[name]) if name in found else "–" for name in scores),
                    ]
                    for value, found in values.items()
                ],
            }
        )
    return tables


def _cell(score: str, figure: Mapping[str, Any]) -> dict[str, str]:
    number, spread = _number_and_range(score, figure)
    return {"text": number, "range": "" if spread == "–" else spread}


def _provenance(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    run, codes = metrics["run"], metrics.get("codes")
    lines = [("Benchmark", f"{metrics['title']} ({metrics['benchmark']})"), ("Protocol", protocol_text(metrics))]
    counts = metrics["counts"]
    if counts["closed"] or counts["open"]:
        lines.append(("Questions", f"{counts['closed']:,} closed, {counts['open']:,} open"))
    if codes:
        rates = codes["answers"]
        lines.append(
            (
                "Codes",
                f"{rates['codes_per_answer']:.2f} an answer for {rates['references_per_answer']:.2f} references; "
                f"share of answers with no code {100 * rates['no_code_rate']:.1f}%",
            )
        )
        sources = {"codebook": "the model's codebook", "data set": "the data set"}
        told = [f"{sources[name]} for {count:,} rows" for name, count in metrics["reference_codes"]["from"].items()]
        lines.append(("Right codes", f"from {' and '.join(told)}" if told else "not known"))
    drawn = "95% bootstrap, drawn by {}, {samples:,} samples, seed {seed}"
    lines.append(("Intervals", drawn.format(metrics["interval_unit"], **metrics["bootstrap"])))
    for name, key in (("Weights", "weights_sha256"), ("Settings", "settings_sha256")):
        if "checkpoint" in run:
            lines.append((f"{name} of the checkpoint", f"sha256 {run['checkpoint'][key]}"))
    if "predictions_sha256" in run:
        lines.append(("Predictions", f"sha256 {run['predictions_sha256']}"))
    lines.append(("Data", f"{run['data']['path']}, {run['data']['rows']:,} rows, sha256 {run['data']['sha256']}"))
    if "dtype" in run:
        lines.append(
            (
                "Answers",
                f"greedy, {run['dtype']}, at most {run['max_new_tokens']} tokens, masks above {run['threshold']}",
            )
        )
    return lines
