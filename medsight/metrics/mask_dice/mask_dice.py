"""Dice, IoU, HD95 and surface Dice over a benchmark, by named presets, from one record an item and no mask.

`score_item` turns an item's masks into a record, this metric takes means of records:

    records = [score_item(predicted, references, preset="medsight") for predicted, references in answers]
    metric.compute(items=records, groups=modalities, preset="medsight")
"""

from collections import Counter
from typing import Any

import datasets
import evaluate

from .mask_counts import COUNTS, PRESETS, MaskProtocol, choose_protocol, dice, score_item


__all__ = ["PRESETS", "MaskDice", "MaskProtocol", "choose_protocol", "score_item"]

DESCRIPTION = """\
Scores segmentation masks by named presets: Dice, IoU, HD95 and surface Dice, over items and over groups of them."""
INPUTS = """
Args:
    items: list of records of `score_item`.
    groups: list of str, such as the modality; needed where the average is macro.
    preset: "medsight", "medplib", "citrus", "biomedparse" or "named", as the items were scored; else None and
    threshold, missing, multi, formula: held against the flags that the items were scored by, where given.
    average: "micro" (default) or "macro", which `dice` is.
Returns:
    dice, by the protocol's average; dice_micro, iou_micro, dice_macro, iou_macro, dice_pooled; hd95_mm, surface_dice
    and their numbers of items; n, scored, refused, refusals {reason: count}, thresholded; no_mask_rate,
    masks_per_answer, references_per_item; groups {name: the same}; scores, a float an item, None where it is refused;
    preset and protocol. None stands for a mean over nothing.
Examples:
    >>> from medsight.metrics.mask_dice.mask_dice import score_item
    >>> import numpy
    >>> mask = numpy.eye(4, dtype=bool)
    >>> metric = evaluate.load("medsight/metrics/mask_dice")
    >>> metric.compute(items=[score_item([mask], [mask], preset="medplib")], preset="medplib")["dice"]
    1.0
"""
CITATION = """\
@article{nikolov2018deep,
  title={Deep learning to achieve clinically applicable segmentation of head and neck anatomy for radiotherapy},
  author={Nikolov, Stanislav and others}, journal={arXiv:1809.04430}, year={2018}}
"""


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def summarize(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and counts of some records."""
    scored = [item for item in items if item["dice"] is not None]
    distances = [item["hd95_mm"] for item in items if item["hd95_mm"] is not None]
    surfaces = [item["surface_dice"] for item in items if item["surface_dice"] is not None]
    pixels = [sum(item[name] for item in scored) for name in COUNTS]
    return {
        "dice_micro": _mean([item["dice"] for item in scored]),
        "iou_micro": _mean([item["iou"] for item in scored]),
        "dice_pooled": dice(*pixels) if scored else None,
        "hd95_mm": _mean(distances),
        "hd95_items": len(distances),
        "surface_dice": _mean(surfaces),
        "surface_dice_items": len(surfaces),
        "n": len(items),
        "scored": len(scored),
        "refused": len(items) - len(scored),
        "refusals": dict(Counter(item["reason"] for item in items if item["reason"] is not None)),
        "thresholded": sum(item["thresholded"] for item in items),
        "no_mask_rate": _mean([float(item["n_predicted"] == 0) for item in items]),
        "masks_per_answer": _mean([item["n_predicted"] for item in items]),
        "references_per_item": _mean([item["n_references"] for item in items]),
    }


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class MaskDice(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        number, count, text = (datasets.Value(kind) for kind in ("float64", "int64", "string"))
        record = {
            **dict.fromkeys(("dice", "iou", "hd95_mm", "surface_dice"), number),
            **dict.fromkeys(("n_predicted", "n_references", *COUNTS), count),
            "reason": text,
            "thresholded": datasets.Value("bool"),
            "protocol": text,
            "tolerance_mm": number,
        }
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"items": record, "groups": text}),
        )

    def add_batch(self, *, items: list[dict[str, Any]], groups: list[str] | None = None) -> None:
        """Add a batch of records of `score_item`, with groups where the average is macro.

        Raises:
            ValueError: there are not as many groups as items, or an item is no such record.
        """
        expected = list(self.features["items"])
        for i, item in enumerate(items):
            if not isinstance(item, dict) or set(item) != set(expected):
                raise ValueError(f"item {i}: expected score_item's record ({', '.join(expected)}), got {item!r}")
        # evaluate refuses None for text; a reason is the one text that may be absent.
        filled = [{**item, "reason": item["reason"] or ""} for item in items]
        evaluate.Metric.add_batch(self, items=filled, groups=groups or [""] * len(items))

    def compute(self, *, items: Any = None, groups: Any = None, **protocol: Any) -> dict[str, Any]:
        """Means of the records given here, or added before; ValueError where another protocol scored them."""
        if items is not None:
            self.add_batch(items=items, groups=groups)
        if len(self) == 0:
            raise ValueError("no items to score: add some, or pass items, the records of score_item")
        return evaluate.Metric.compute(self, **protocol)

    def _compute(
        self, items: list[dict[str, Any]], groups: list[str], preset: str | None = None, **flags: Any
    ) -> dict[str, Any]:
        protocol = choose_protocol(preset, **flags)
        found = sorted({item["protocol"] for item in items})
        if len(found) > 1 or len({item["tolerance_mm"] for item in items}) > 1:
            raise ValueError(f"the items were scored by several protocols or tolerances: {'; '.join(found)}")
        asked = [f"{name}={flag}" for name, flag in flags.items() if flag is not None and name != "average"]
        differing = [part for part in (str(protocol).split() if preset else asked) if part not in found[0].split()]
        if differing:
            raise ValueError(f"expected items scored by {' '.join(differing)}, got {found[0]}")
        if protocol.average == "macro" and "" in groups:
            raise ValueError("the macro average needs groups, a name for each item")
        items = [{**item, "reason": item["reason"] or None} for item in items]
        by_group = {
            name: summarize([item for item, group in zip(items, groups, strict=True) if group == name])
            for name in sorted(set(groups) - {""})
        }
        result = summarize(items)
        for name in ("dice", "iou"):
            means = [group[f"{name}_micro"] for group in by_group.values()]
            result[f"{name}_macro"] = _mean([mean for mean in means if mean is not None])
        return {
            "dice": result[f"dice_{protocol.average}"],
            **result,
            "tolerance_mm": items[0]["tolerance_mm"],
            "groups": by_group,
            "scores": [item["dice"] for item in items],
            "preset": preset,
            "protocol": f"{found[0]} average={protocol.average}",
        }
