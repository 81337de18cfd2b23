"""report.html: one self-contained page, with nothing to fetch."""

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medsight import __version__
from medsight.evaluation.items import Item
from medsight.evaluation.predictions import Prediction


TEMPLATE = Path(__file__).with_name("report.html.jinja")
CASES, PICTURE_SIDE, JPEG_QUALITY = 4, 512, 84
TOP_CODES = 20
LABELS = {
    "answer": "All questions",
    "closed_accuracy": "Closed accuracy",
    "open_recall": "Open recall",
    "dice": "Dice",
    "iou": "IoU",
    "hd95_mm": "HD95 (mm)",
    "surface_dice": "Surface Dice",
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
        table_caption="Small print: 95% bootstrap intervals over rows, taken as independent even within a patient.",
        cases=_cases(metrics, rows, items, predictions),
        key=["reference", "answer"] if "negatives" in metrics else ["", "regions that the answer cites"],
        confusion=confusion(rows),
        code_usage=_code_usage(metrics),
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
    from medsight.prediction import align

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
                "caption": "Mean over rows, in percent, with its 95% bootstrap interval.",
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


def _cases(
    metrics: Mapping[str, Any],
    rows: Sequence[Row],
    items: Sequence[Item],
    predictions: Mapping[str, Prediction],
) -> list[dict[str, Any]]:
    """The worst, middle and best rows by the main score, of as many modalities as there are; and false masks."""
    name = main_score(metrics)
    field = {"dice": "dice", "answer": "answer_score"}[name]
    called = "Score" if name == "answer" else LABELS[name]
    ranked = sorted((row[field], index) for index, row in enumerate(rows) if row.get(field) is not None)
    middle = ranked[len(ranked) // 2][0] if ranked else 0.0
    orders = {
        "Worst": ranked,
        "Around the median": sorted(ranked, key=lambda entry: (abs(entry[0] - middle), entry[1])),
        "Best": sorted(ranked, key=lambda entry: (-entry[0], entry[1])),
    }
    picked, taken = {}, set()
    for title in ("Worst", "Best", "Around the median"):
        free = [entry for entry in orders[title] if entry[1] not in taken]
        picked[title] = _varied(free, rows)
        taken |= {index for _, index in picked[title]}
    picked = {title: picked[title] for title in orders}
    groups = [
        {"title": title, "cases": [_case(name, called, score, rows[i], items[i], predictions) for score, i in entries]}
        for title, entries in picked.items()
        if entries
    ]
    false = [index for index, row in enumerate(rows) if row.get("false_mask")][:CASES]
    if false:
        cases = [_case(name, called, None, rows[i], items[i], predictions) for i in false]
        groups.append({"title": "A mask where there is nothing to find", "cases": cases})
    return groups


def _varied(ranked: Sequence[tuple[float, int]], rows: Sequence[Row]) -> list[tuple[float, int]]:
    """Some of the first quarter of a ranking, one a modality before a second of any."""
    seen: Counter[str] = Counter()
    rounds = []
    for place, (_, index) in enumerate(ranked[: max(CASES, len(ranked) // 4)]):
        modality = rows[index]["modality"]
        rounds.append((seen[modality], place))
        seen[modality] += 1
    return [ranked[place] for place in sorted(place for _, place in sorted(rounds)[:CASES])]


def _case(
    name: str, called: str, score: float | None, row: Row, item: Item, predictions: Mapping[str, Prediction]
) -> dict[str, Any]:
    picture = case_picture(item, predictions.get(item.id))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=JPEG_QUALITY)
    shown = " ".join(item.prompt.replace("<image>", " ").split())
    return {
        "picture": f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode('ascii')}",
        "width": picture.width,
        "height": picture.height,
        "alt": f"{item.modality} image of {item.site}, {item.id}",
        "score": "false mask" if score is None else f"{called} {_number(name, score)}",
        "origin": " · ".join(part for part in (item.dataset, item.modality) if part != "-"),
        "prompt": shown if len(shown) < 160 else f"{shown[:160]}…",
        "answer": row["answer"] or "(empty answer)",
        "reference": item.answer,
    }


def case_picture(item: Item, prediction: Prediction | None) -> Image.Image:
    """An item's image with its reference in orange and the answer's masks, as one, in blue."""
    from medsight.evaluation.scoring import predicted_masks, reference_masks
    from medsight.overlay import draw_overlay
    from medsight.predict import read_image
    from medsight.training.data.pictures import read_picture

    image = read_image(read_picture(item.images[0]))
    size = (image.height, image.width)
    if not item.masks and (prediction is None or not prediction.masks):
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        return image
    nothing = np.zeros(size, dtype=bool)
    references = np.logical_or.reduce([nothing, *reference_masks(item)])
    answered = np.logical_or.reduce([nothing, *(predicted_masks(prediction, size) if prediction else [])])
    drawn = draw_overlay(image, [references, answered], ["reference", "answer"])
    # The page has one key for all pictures, so the overlay's own legend is cut off.
    scale = max(max(image.size), PICTURE_SIDE) / max(image.size)
    height, width = max(1, round(image.height * scale)), max(1, round(image.width * scale))
    left = (drawn.width - width) // 2
    drawn = drawn.crop((left, 0, left + width, height))
    drawn.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return drawn


def confusion(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Groups of images (rows) against the group of the first code that the answer cites (columns), if any."""
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if "n_masks" in row and not row["absent"]:
            cited = next((group for group in row["groups"] if group), None)
            counted[f"{row['modality']} {row['site']}"][cited or "no code"] += 1
    columns = sorted({name for some in counted.values() for name in some} - {"no code"})
    if not columns:
        return None
    # The columns stand in the order of the rows that they belong to, so that right ones lie on a diagonal.
    order = {name.lower(): index for index, name in enumerate(sorted(counted))}
    columns.sort(key=lambda name: (_place(name, order), name))
    if any(some["no code"] for some in counted.values()):
        columns.append("no code")
    return {
        "columns": columns,
        "rows": [
            {
                "name": name,
                "cells": [
                    {
                        "text": some[column] or "",
                        "share": round(some[column] / sum(some.values()), 3),
                        "diagonal": belongs(name, column),
                    }
                    for column in columns
                ],
            }
            for name, some in sorted(counted.items())
        ],
    }


def _place(group: str, order: Mapping[str, int]) -> int:
    return next((index for name, index in order.items() if belongs(name, group)), len(order))


def belongs(origin: str, group: str) -> bool:
    """Whether a group is called like images of "MODALITY SITE", or like these up to the modality's first hyphen."""
    modality, _, site = origin.lower().partition(" ")
    return group.lower() in (origin.lower(), f"{modality.split('-')[0]} {site}")


def _code_usage(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    codes = metrics.get("codes")
    if codes is None or not codes["usage"]["citations"]:
        return None
    sizes, usage = metrics["run"].get("codes_per_group") or {}, codes["usage"]
    most = max(found["n"] for group in usage["groups"].values() for found in group["codes"].values())
    groups = []
    for name, group in usage["groups"].items():
        if not group["citations"]:
            continue
        size = sizes.get(name, len(group["codes"]))
        live = f"{group['live_codes']} of {size} codes" if name in sizes else f"{group['live_codes']} codes"
        cells = [
            {
                "share": round((found["n"] / most) ** 0.5, 3),
                "title": f"{code}: {found['n']} × ({_shares(found['structures'])})",
            }
            for code, found in group["codes"].items()
        ]
        cells += [{"share": 0, "title": "not cited"}] * (size - len(cells))
        groups.append(
            {
                "name": name,
                "detail": f"{group['citations']:,} cited · {live} · perplexity {group['perplexity']:.1f} · "
                f"purity {group['purity']:.2f} · NMI {group['nmi']:.2f}",
                "cells": cells,
            }
        )
    cited = [
        {"code": code, "group": name, "count": found["n"], "structures": _shares(found["structures"])}
        for name, group in usage["groups"].items()
        for code, found in group["codes"].items()
    ]
    cited.sort(key=lambda row: (-row["count"], row["code"]))
    return {
        "caption": "A square a code, darker where it is cited more often; its structures by pointing at it. Purity: "
        "how alike a code's structures are; NMI: how much a code tells of the structure, within its group.",
        "groups": groups,
        "top": cited[:TOP_CODES],
    }


def _shares(structures: Mapping[str, float], shown: int = 3) -> str:
    some = [f"{name} {100 * share:.0f}%" for name, share in list(structures.items())[:shown]]
    return ", ".join([*some, *(["…"] if len(structures) > shown else [])])


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
    lines.append(("Intervals", "bootstrap over rows, {samples:,} samples, seed {seed}".format(**metrics["bootstrap"])))
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
