"""The region codes of report.html: which groups are cited for which images, and how often each code."""

from collections.abc import Mapping
from typing import Any

from medsight.data.groups import group_names_of
from medsight.text import first_few

from .summary import NO_CODE


TOP_CODES = 20
CAPTIONS = {
    "classifier": "Columns: the group that the model's own classifier takes it for, over all rows.",
    "cited codes": "Columns: the group of the first code that the answer cites, since the predictions do not say what "
    "group the system takes an image for. Questions about absent structures are left out.",
}


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
