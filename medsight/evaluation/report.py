"""report.html: one self-contained page, with nothing to fetch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from medsight import __version__
from medsight.data.groups import group_names_of
from medsight.text import first_few

from .cases import Case
from .figures import has_modalities, label, main_score, notes_of, number_and_range, protocol_text, rates, row_count
from .predictions import Prediction
from .report_cases import choose_cases
from .summary import NO_CODE


TEMPLATE = Path(__file__).with_name("report.html.jinja")
FIELDS = {
    "modality": "modality",
    "dataset": "data set",
    "target": "target",
    "site": "body site",
    "answer_type": "answer type",
    "reference": "diagnosis",
}
TOP_CODES = 20
CAPTIONS = {
    "classifier": "Columns: the group that the model's own classifier takes it for, over all rows.",
    "cited codes": "Columns: the group of the first code that the answer cites, since the predictions do not say what "
    "group the system takes an image for. Questions about absent structures are left out.",
}
Row = Mapping[str, Any]


def report_page(
    metrics: Mapping[str, Any], rows: Sequence[Row], cases: Sequence[Case], predictions: Mapping[str, Prediction]
) -> str:
    """The page for one run: the content of metrics.json, the rows of `score_rows`, and what they are about."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=metrics["title"],
        system=metrics["system"],
        count=row_count(metrics),
        protocol=protocol_text(metrics),
        cards=_cards(metrics),
        notes=notes_of(metrics),
        charts=_charts(metrics),
        tables=_tables(metrics),
        table_caption=f"Small print: 95% bootstrap intervals, drawn by {metrics['interval_unit']}.",
        cases=choose_cases(main_score(metrics), rows, cases, predictions),
        key=["reference", "answer"] if "negatives" in metrics else ["", "regions that the answer cites"],
        confusion=confusion(metrics),
        code_usage=code_usage(metrics),
        provenance=_provenance(metrics),
        version=__version__,
    )


def _cards(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    figures = []
    for name, both in metrics["scores"].items():
        called = label(metrics, name)
        if name == main_score(metrics) and has_modalities(metrics):
            figures.append((f"{called}, macro", name, both["macro"], " over modalities"))
            called = f"{called}, micro"
        figures.append((called, name, both["micro"], ""))
    figures += [(title, "rate", figure, "") for title, figure in rates(metrics)]
    cards = []
    for title, name, figure, over in figures:
        value, spread = number_and_range(name, figure)
        value = f"{value} %" if name == "rate" else value
        cards.append({"label": title, "value": value, "detail": f"95%: {spread} · {figure['n']:,} rows{over}"})
    return cards


def _charts(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bars by the first field of more than one value."""
    charts = []
    several = [field for field, values in metrics["by"].items() if len(values) > 1 and field != "answer_type"]
    for field in several[:1]:
        for name in ("dice", "answer"):
            figures = [(value, found[name]) for value, found in metrics["by"][field].items() if name in found]
            if figures:
                figures.sort(key=lambda entry: (-entry[1]["value"], entry[0]))
                charts.append(
                    {
                        "title": f"{label(metrics, name)} by {FIELDS[field]}",
                        "caption": "Mean over rows, in percent, with its 95% interval, drawn by "
                        f"{metrics['interval_unit']}.",
                        "bars": [_bar(name, value, figure) for value, figure in figures],
                    }
                )
    return charts


def _bar(score: str, name: str, figure: Mapping[str, Any]) -> dict[str, Any]:
    number, spread = number_and_range(score, figure)
    ends = figure["low"] is not None
    return {
        "name": name,
        "value": round(100 * figure["value"], 2),
        "low": round(100 * figure["low"], 2) if ends else None,
        "width": round(100 * (figure["high"] - figure["low"]), 2) if ends else None,
        "text": f"{number} · n {figure['n']:,}",
    }


def _tables(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    means = ["micro", "macro"] if has_modalities(metrics) else ["micro"]
    overall = [
        [label(metrics, name), *(_cell(name, both[mean]) for mean in means), f"{both['micro']['n']:,}"]
        for name, both in metrics["scores"].items()
    ]
    tables = [{"title": "overall", "open": True, "columns": ["", *means, "rows"], "rows": overall}]
    for field, values in metrics["by"].items():
        if len(values) < 2:
            continue
        scores = [name for name in metrics["scores"] if any(name in found for found in values.values())]
        rows = [
            [value, f"{found['n']:,}", *(_cell(name, found[name]) if name in found else "–" for name in scores)]
            for value, found in values.items()
        ]
        columns = [FIELDS[field], "rows", *(label(metrics, name) for name in scores)]
        tables.append({"title": f"by {FIELDS[field]}", "open": field == "modality", "columns": columns, "rows": rows})
    return tables


def _cell(score: str, figure: Mapping[str, Any]) -> dict[str, str]:
    number, spread = number_and_range(score, figure)
    return {"text": number, "range": "" if spread == "–" else spread}


def _provenance(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    run, codes, counts = metrics["run"], metrics.get("codes"), metrics["counts"]
    lines = [("Benchmark", f"{metrics['title']} ({metrics['benchmark']})"), ("Protocol", protocol_text(metrics))]
    if counts["closed"] or counts["open"]:
        lines.append(("Questions", f"{counts['closed']:,} closed, {counts['open']:,} open"))
    if codes:
        cited = codes["answers"]
        if cited["n_counted"]:
            said = (
                f"{cited['codes_per_answer']:.2f} an answer for {cited['references_per_answer']:.2f} references; "
                f"share of answers with no code {100 * cited['no_code_rate']:.1f}%"
            )
            lines.append(("Codes", said))
        sources = {"codebook": "the model's codebook", "data set": "the data set"}
        origins = [f"{sources[name]} for {count:,} rows" for name, count in metrics["reference_codes"]["from"].items()]
        lines.append(("Right codes", f"from {' and '.join(origins)}" if origins else "not known"))
    drawn = "95% bootstrap, drawn by {}, {samples:,} samples, seed {seed}"
    lines.append(("Intervals", drawn.format(metrics["interval_unit"], **metrics["bootstrap"])))
    if "checkpoint" in run:
        lines.append(("Weights of the checkpoint", f"sha256 {run['checkpoint']['weights_sha256']}"))
        lines.append(("Settings of the checkpoint", f"sha256 {run['checkpoint']['settings_sha256']}"))
    if "predictions_sha256" in run:
        lines.append(("Predictions", f"sha256 {run['predictions_sha256']}"))
    lines.append(("Data", f"{run['data']['path']}, {run['data']['rows']:,} rows, sha256 {run['data']['sha256']}"))
    if "dtype" in run:
        how = f"greedy, {run['dtype']}, at most {run['max_new_tokens']} tokens, masks above {run['threshold']}"
        lines.append(("Answers", how))
    return lines


def confusion(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """What images are (rows) against the code group that they are taken for (columns), if any is known."""
    groups = metrics.get("predicted_groups")
    if groups is None:
        return None
    counts: Mapping[str, Mapping[str, int]] = groups["counts"]

    # The columns stand in the order of the rows that they belong to, so that right ones lie on a diagonal.
    def place(group: str) -> tuple[bool, int, str]:
        owners = [index for index, name in enumerate(sorted(counts)) if belongs(name, group)]
        return group == NO_CODE, owners[0] if owners else len(counts), group

    columns = sorted({name for cited in counts.values() for name in cited}, key=place)
    rows = []
    for name, cited in sorted(counts.items()):
        cells = [
            {
                "text": cited.get(column, ""),
                "share": round(cited.get(column, 0) / sum(cited.values()), 3),
                "diagonal": belongs(name, column),
            }
            for column in columns
        ]
        rows.append({"name": name, "cells": cells})
    return {"caption": CAPTIONS[groups["by"]], "columns": columns, "rows": rows}


def belongs(origin: str, group: str) -> bool:
    """Whether a group is called like images of "MODALITY SITE", or like these up to the modality's first hyphen."""
    modality, _, site = origin.partition(" ")
    return group.lower() in group_names_of(modality, site)


def code_usage(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """How often each code is cited and for what, by group; None without codes."""
    codes = metrics.get("codes")
    if codes is None or not codes["usage"]["citations"]:
        return None
    sizes, usage = metrics["run"].get("codes_per_group") or {}, codes["usage"]
    cited = [
        {"code": code, "group": name, "count": found["n"], "structures": _shares(found["structures"])}
        for name, group in usage["groups"].items()
        for code, found in group["codes"].items()
    ]
    most = max(row["count"] for row in cited)
    groups = []
    for name, group in usage["groups"].items():
        if not group["citations"]:
            continue
        size = sizes.get(name, len(group["codes"]))
        live = f"{group['live_codes']} of {size} codes" if name in sizes else f"{group['live_codes']} codes"
        detail = (
            f"{group['citations']:,} cited · {live} · perplexity {group['perplexity']:.1f} · "
            f"purity {group['purity']:.2f} · NMI {group['nmi']:.2f}"
        )
        cells = [
            {
                "share": round((row["count"] / most) ** 0.5, 3),
                "title": f"{row['code']}: {row['count']} × ({row['structures']})",
            }
            for row in cited
            if row["group"] == name
        ]
        cells += [{"share": 0, "title": "not cited"}] * (size - len(cells))
        groups.append({"name": name, "detail": detail, "cells": cells})
    cited.sort(key=lambda row: (-row["count"], row["code"]))
    return {
        "caption": "A square a code, darker where it is cited more often; its structures by pointing at it. Purity: "
        "how alike a code's structures are; NMI: how much a code tells of the structure, within its group.",
        "groups": groups,
        "top": cited[:TOP_CODES],
    }


def _shares(structures: Mapping[str, float]) -> str:
    return first_few([f"{name} {100 * share:.0f}%" for name, share in structures.items()])
