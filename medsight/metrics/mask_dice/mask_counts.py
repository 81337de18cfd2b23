"""Masks against reference masks: pixel counts and boundary distances of one item, by a protocol.

Sources: Dice (1945) and Jaccard (1912) as counts of pixels; the 95th-percentile Hausdorff distance and the surface
Dice of Nikolov et al. (2018, arXiv 1809.04430), by DeepMind's implementation in the package `segmentationmetrics`; the
presets from the evaluation code of MedSIGHT (arXiv 2606.06760, ICML 2026), MedPLIB (`model/eval/vqa_infer.py`),
Citrus and BiomedParse; `named` is ours.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np


MISSING = ("zero", "skip")
MULTI = ("mean", "union", "best", "order", "first", "last", "single")
AVERAGES = ("micro", "macro")
FORMULAS = ("plain", "smoothed", "from-iou", "epsilon")


@dataclass(frozen=True)
class MaskProtocol:
    """How masks become a score.

    Attributes:
        threshold: probability above which a pixel is inside; masks that come as booleans are taken as they are.
        missing: an answer without a mask scores 0 where there is something to find (`zero`), or is left out and
            counted (`skip`). Where there is nothing to find either, both are empty and the formula decides.
        multi: which masks are compared. `mean`: each predicted mask with the union of the references; `union`: union
            with union; `best`: each reference with the predicted mask of the best Dice (an upper bound); `order`: the
            i-th with the i-th, those left over with an empty mask; `first`: the first pair; `last`: the last pair
            that both lists reach; `single`: at most one of each, more are refused. An item's score is the mean over
            its comparisons.
        formula: Dice of I, P and G pixels. `plain`: 2I / (P + G), 1 where both are empty; `smoothed`:
            (2I + 1e-8) / (P + G + 1e-8); `from-iou`: 2 IoU / (1 + IoU), 0 for an empty union; `epsilon`:
            2I / (P + G + 1e-6).
        average: `micro` over items, `macro` the unweighted mean over groups.
    """

    threshold: float = 0.5
    missing: str = "zero"
    multi: str = "mean"
    formula: str = "plain"
    average: str = "micro"

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold {self.threshold!r}: expected a probability between 0 and 1")
        for name, allowed in (("missing", MISSING), ("multi", MULTI), ("formula", FORMULAS), ("average", AVERAGES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")

    def __str__(self) -> str:
        """What an item's score depends on; the average is taken afterwards."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items() if name != "average")


PRESETS = {
    "medsight": MaskProtocol(0.5, "zero", "mean", "smoothed", "macro"),
    "medplib": MaskProtocol(0.1, "zero", "last", "from-iou", "micro"),
    "citrus": MaskProtocol(0.5, "zero", "first", "plain", "macro"),
    "biomedparse": MaskProtocol(0.5, "zero", "single", "epsilon", "micro"),
    "named": MaskProtocol(0.5, "zero", "order", "plain", "macro"),  # several structures, one mask each
}


def choose_protocol(preset: str | None = None, **flags: Any) -> MaskProtocol:
    """A preset, or the default with these flags; a flag that is None counts as not given.

    Raises:
        ValueError: the preset or a flag is unknown, or a flag is given beside a preset, whose name would then lie.
    """
    flags = {name: value for name, value in flags.items() if value is not None}
    if preset is None:
        return replace(MaskProtocol(), **flags)
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r}: choose one of {', '.join(PRESETS)}")
    if flags:
        raise ValueError(f"preset {preset!r} fixes {', '.join(flags)}: give either the preset or the flags")
    return PRESETS[preset]


def score_item(
    predicted: Sequence[Any],
    references: Sequence[Any],
    *,
    preset: str | None = None,
    threshold: float | None = None,
    missing: str | None = None,
    multi: str | None = None,
    formula: str | None = None,
    values: str = "logits",
    spacing_mm: Sequence[float] | None = None,
    tolerance_mm: float = 2.0,
) -> dict[str, Any]:
    """Score one answer's masks; keep what this returns, not the masks.

    Args:
        predicted: masks of the answer: (height, width) booleans at the references' size, or (h, w) floats, which are
            resized bilinearly to it before the threshold. Empty where the answer shows none.
        references: (height, width) booleans, all of one size. Empty where there is nothing to find.
        preset, threshold, missing, multi, formula: see `MaskProtocol`; a preset or flags.
        values: what floats are, "logits" (before the sigmoid) or "probabilities".
        spacing_mm: height and width of a pixel in millimetres, where they are known.
        tolerance_mm: distance up to which a boundary counts as met in surface Dice.

    Returns:
        `dice`, `iou`; `hd95_mm`, the larger of the two directed 95th-percentile distances between the boundaries, None
        without a spacing or where a compared mask is empty; `surface_dice`, the share of both boundaries that lies
        within the tolerance of the other one, None without a spacing, 1 where both masks are empty, 0 where one is;
        `n_predicted`, `n_references`; `intersection`, `predicted_area`, `reference_area`, pixels summed over the
        comparisons; `reason`, why the item has no Dice, else None; `thresholded`, whether the threshold was applied;
        `protocol`; `tolerance_mm`.

    Raises:
        ValueError: a mask is not of two dimensions, of another size or type, or holds NaN; probabilities lie outside 0
            to 1; a flag, the spacing or the tolerance is out of range.
        ImportError: the spacing is given and `segmentationmetrics` is not installed.
    """
    protocol = choose_protocol(preset, threshold=threshold, missing=missing, multi=multi, formula=formula)
    spacing = _checked_spacing(spacing_mm, tolerance_mm)
    wanted = [_boolean(mask, f"reference {i}") for i, mask in enumerate(references)]
    for i, mask in enumerate(wanted):
        if mask.shape != wanted[0].shape:
            raise ValueError(f"reference {i}: its size {mask.shape} is not {wanted[0].shape}, that of reference 0")
    size = wanted[0].shape if wanted else None
    shown = []
    for i, mask in enumerate(predicted):
        shown.append(_thresholded(np.asarray(mask), f"predicted mask {i}", size, protocol.threshold, values))
        size = size or shown[0].shape
    item: dict[str, Any] = {
        "dice": None,
        "iou": None,
        "hd95_mm": None,
        "surface_dice": None,
        "n_predicted": len(shown),
        "n_references": len(wanted),
        "intersection": 0,
        "predicted_area": 0,
        "reference_area": 0,
        "reason": _refusal(protocol, shown, wanted),
        "thresholded": any(np.asarray(mask).dtype != bool for mask in predicted),
        "protocol": str(protocol),
        "tolerance_mm": float(tolerance_mm),
    }
    if item["reason"] is not None:
        return item
    nothing = np.zeros(size or (1, 1), dtype=bool)
    pairs = _comparisons(shown, wanted, nothing, protocol)
    counts = [_counts(*pair) for pair in pairs]
    if not shown and any(mask.any() for mask in wanted):
        item["dice"] = item["iou"] = 0.0  # a smoothed formula would give a little more
    else:
        both_empty = round(dice(0, 0, 0, formula=protocol.formula))
        item["dice"] = _mean([dice(*count, formula=protocol.formula) for count in counts])
        item["iou"] = _mean([i / (p + g - i) if p + g else both_empty for i, p, g in counts])
    for i, name in enumerate(("intersection", "predicted_area", "reference_area")):
        item[name] = sum(count[i] for count in counts)
    if spacing is not None:
        distances = [boundary_distances(*pair, spacing, tolerance_mm) for pair in pairs]
        item["hd95_mm"] = None if any(hd is None for hd, _ in distances) else _mean([hd for hd, _ in distances])
        item["surface_dice"] = _mean([surface for _, surface in distances])
    return item


def dice(intersection: int, predicted_area: int, reference_area: int, formula: str = "plain") -> float:
    """Dice of pixel counts; see `MaskProtocol.formula`."""
    i, both = intersection, predicted_area + reference_area
    if formula == "smoothed":
        return (2 * i + 1e-8) / (both + 1e-8)
    if formula == "epsilon":
        return 2 * i / (both + 1e-6)
    if both == 0:
        return 0.0 if formula == "from-iou" else 1.0
    if formula == "from-iou":
        iou = i / (both - i)
        return 2 * iou / (1 + iou)
    return 2 * i / both


def boundary_distances(
    predicted: np.ndarray, reference: np.ndarray, spacing_mm: tuple[float, float], tolerance_mm: float
) -> tuple[float | None, float]:
    """HD95 in millimetres and surface Dice of two boolean masks of one size, boundaries weighted by their length."""
    if not predicted.any() or not reference.any():
        return None, float(predicted.any() == reference.any())
    try:
        from segmentationmetrics import surface_distance
    except ImportError as error:
        raise ImportError("distances in millimetres need segmentationmetrics: pip install 'medsight[eval]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of scipy.ndimage.filters, by the library
        distances = surface_distance.compute_surface_distances(reference, predicted, spacing_mm)
    hd95 = surface_distance.compute_robust_hausdorff(distances, 95)
    return float(hd95), float(surface_distance.compute_surface_dice_at_tolerance(distances, tolerance_mm))


def resize_bilinear(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) values at the pixel centres of another (height, width), as torch's `interpolate(align_corners=False)`."""
    for axis, length in enumerate(size):
        position = ((np.arange(length) + 0.5) * values.shape[axis] / length - 0.5).clip(0, values.shape[axis] - 1)
        before = np.floor(position).astype(int)
        after = np.minimum(before + 1, values.shape[axis] - 1)
        share = (position - before).reshape((-1, 1) if axis == 0 else (1, -1))
        values = values.take(before, axis) * (1 - share) + values.take(after, axis) * share
    return values


def _refusal(protocol: MaskProtocol, shown: list[np.ndarray], wanted: list[np.ndarray]) -> str | None:
    if not shown and protocol.missing == "skip":
        return "no mask in the answer"
    if protocol.multi == "single" and max(len(shown), len(wanted)) > 1:
        return "several masks where the protocol takes one"
    return None


def _comparisons(
    shown: list[np.ndarray], wanted: list[np.ndarray], nothing: np.ndarray, protocol: MaskProtocol
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of a predicted mask and a reference; at least one, `nothing` where a side has none."""
    p, g = shown or [nothing], wanted or [nothing]
    if protocol.multi == "mean":
        everything = np.logical_or.reduce(g)
        return [(mask, everything) for mask in p]
    if protocol.multi == "union":
        return [(np.logical_or.reduce(p), np.logical_or.reduce(g))]
    if protocol.multi == "best":
        return [(max(p, key=lambda m: dice(*_counts(m, mask), formula=protocol.formula)), mask) for mask in g]
    if protocol.multi == "order":
        longer = max(len(p), len(g))
        return list(zip(p + [nothing] * (longer - len(p)), g + [nothing] * (longer - len(g)), strict=True))
    last = min(len(p), len(g)) - 1 if protocol.multi == "last" else 0
    return [(p[last], g[last])]


def _counts(predicted: np.ndarray, reference: np.ndarray) -> tuple[int, int, int]:
    both = np.count_nonzero(predicted & reference)
    return int(both), int(np.count_nonzero(predicted)), int(np.count_nonzero(reference))


def _thresholded(mask: np.ndarray, name: str, size: Any, threshold: float, values: str) -> np.ndarray:
    if values not in ("logits", "probabilities"):
        raise ValueError(f"values={values!r}: choose logits or probabilities")
    if not np.issubdtype(mask.dtype, np.floating):
        mask = _boolean(mask, name)
        if size is not None and mask.shape != size:
            raise ValueError(f"{name}: its size {mask.shape} is not the reference's {size}")
        return mask
    if mask.ndim != 2 or 0 in mask.shape:
        raise ValueError(f"{name}: expected two dimensions, (height, width), got shape {mask.shape}")
    if np.isnan(mask).any():
        raise ValueError(f"{name}: {np.count_nonzero(np.isnan(mask))} of its {mask.size} values are NaN")
    mask = mask.astype(np.float64)
    if values == "probabilities":
        if mask.min() < 0 or mask.max() > 1:
            raise ValueError(f"{name}: probabilities from {mask.min():g} to {mask.max():g}, expected 0 to 1")
        cut = threshold
    else:
        mask, cut = mask.clip(-1e6, 1e6), math.log(threshold / (1 - threshold))  # infinities do not interpolate
    if size is not None and mask.shape != size:
        mask = resize_bilinear(mask, size)
    return mask > cut


def _boolean(mask: Any, name: str) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise ValueError(f"{name}: expected booleans, got {mask.dtype}")
    if mask.ndim != 2 or 0 in mask.shape:
        raise ValueError(f"{name}: expected two dimensions, (height, width), got shape {mask.shape}")
    return mask


def _checked_spacing(spacing_mm: Sequence[float] | None, tolerance_mm: float) -> tuple[float, float] | None:
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise ValueError(f"tolerance_mm {tolerance_mm!r}: expected millimetres, at least 0")
    if spacing_mm is None:
        return None
    spacing = tuple(float(side) for side in spacing_mm)
    if len(spacing) != 2 or not all(math.isfinite(side) and side > 0 for side in spacing):
        raise ValueError(
            f"spacing_mm {spacing_mm!r}: expected a pixel's height and width in millimetres, both above 0"
        )
    return spacing[0], spacing[1]


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values)
