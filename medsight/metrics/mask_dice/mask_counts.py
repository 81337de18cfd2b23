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
from itertools import zip_longest
from typing import Any

import numpy as np
from scipy.ndimage import zoom


CHOICES = {
    "missing": ("zero", "skip"),
    "multi": ("mean", "union", "best", "order", "first", "last", "single"),
    "formula": ("plain", "smoothed", "from-iou", "epsilon"),
    "average": ("micro", "macro"),
}
COUNTS = ("intersection", "predicted_area", "reference_area")


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
            that both lists reach; `single`: the only one of each; an answer of several scores 0, and several
            references are refused. An item's score is the mean over its comparisons.
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
        for name, allowed in CHOICES.items():
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

    A flag beside a preset, whose name would then lie, raises ValueError.
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
    values: str = "logits",
    spacing_mm: Sequence[float] | None = None,
    tolerance_mm: float = 2.0,
    **flags: Any,
) -> dict[str, Any]:
    """Score one answer's masks; keep what this returns, not the masks.

    Args:
        predicted: masks of the answer: (height, width) booleans at the references' size, or (h, w) floats, which are
            resized bilinearly to it before the threshold. Empty where the answer shows none.
        references: (height, width) booleans, all of one size. Empty where there is nothing to find.
        preset, flags: see `MaskProtocol`; a preset, or some of threshold, missing, multi and formula.
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

    Example:
        >>> mask = np.eye(4, dtype=bool)
        >>> score_item([mask], [mask], preset="medplib")["dice"]
        1.0
    """
    protocol = choose_protocol(preset, **flags)
    if values not in ("logits", "probabilities"):
        raise ValueError(f"values={values!r}: choose logits or probabilities")
    if tolerance_mm < 0 or (spacing_mm is not None and (len(spacing_mm) != 2 or min(spacing_mm) <= 0)):
        raise ValueError(
            f"spacing_mm {spacing_mm!r}, tolerance_mm {tolerance_mm!r}: expected millimetres, a pixel's height and "
            "width above 0 and a tolerance of at least 0"
        )
    size, wanted, shown = None, [], []
    for i, mask in enumerate(references):
        wanted.append(_checked(mask, f"reference {i}", size, (bool,)))
        size = wanted[0].shape
    for i, mask in enumerate(predicted):
        shown.append(_thresholded(mask, f"predicted mask {i}", size, protocol.threshold, values))
        size = size or shown[0].shape
    reason = None
    if not shown and protocol.missing == "skip":
        reason = "no mask in the answer"
    elif protocol.multi == "single" and len(wanted) > 1:
        reason = "several references where the protocol takes one"
    item: dict[str, Any] = {
        **dict.fromkeys(("dice", "iou", "hd95_mm", "surface_dice")),
        "n_predicted": len(shown),
        "n_references": len(wanted),
        **dict.fromkeys(COUNTS, 0),
        "reason": reason,
        "thresholded": any(np.asarray(mask).dtype != bool for mask in predicted),
        "protocol": str(protocol),
        "tolerance_mm": float(tolerance_mm),
    }
    if reason is not None:
        return item
    nothing = np.zeros(size or (1, 1), dtype=bool)
    refused = protocol.multi == "single" and len(shown) > 1  # one prompt, one mask
    pairs = _comparisons([nothing] if refused else shown or [nothing], wanted or [nothing], nothing, protocol)
    counts = [_counts(*pair) for pair in pairs]
    item |= zip(COUNTS, map(sum, zip(*counts, strict=True)), strict=True)
    if refused or (not shown and any(mask.any() for mask in wanted)):
        item["dice"] = item["iou"] = 0.0  # a smoothed formula would give a little more
    else:
        both_empty = round(dice(0, 0, 0, formula=protocol.formula))
        item["dice"] = _mean([dice(*count, formula=protocol.formula) for count in counts])
        item["iou"] = _mean([i / (p + g - i) if p + g else both_empty for i, p, g in counts])
    if spacing_mm is not None:
        distances = [boundary_distances(*pair, tuple(spacing_mm), tolerance_mm) for pair in pairs]
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
    predicted: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float
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


def resize_bilinear(values: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(h, w) values at the pixel centres of another (height, width), as torch's `interpolate(align_corners=False)`."""
    factors = (size[0] / values.shape[0], size[1] / values.shape[1])
    return zoom(values, factors, order=1, mode="nearest", grid_mode=True)


def _comparisons(
    p: list[np.ndarray], g: list[np.ndarray], nothing: np.ndarray, protocol: MaskProtocol
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of a predicted mask and a reference; `nothing` stands for one that a list lacks."""
    if protocol.multi == "mean":
        return [(mask, np.logical_or.reduce(g)) for mask in p]
    if protocol.multi == "union":
        return [(np.logical_or.reduce(p), np.logical_or.reduce(g))]
    if protocol.multi == "best":
        return [(max(p, key=lambda m: dice(*_counts(m, mask), formula=protocol.formula)), mask) for mask in g]
    if protocol.multi == "order":
        return list(zip_longest(p, g, fillvalue=nothing))
    last = min(len(p), len(g)) - 1 if protocol.multi == "last" else 0
    return [(p[last], g[last])]


def _counts(predicted: np.ndarray, reference: np.ndarray) -> tuple[int, int, int]:
    both = np.count_nonzero(predicted & reference)
    return int(both), int(np.count_nonzero(predicted)), int(np.count_nonzero(reference))


def _thresholded(mask: Any, name: str, size: tuple[int, ...] | None, threshold: float, values: str) -> np.ndarray:
    mask = _checked(mask, name, size, (bool, np.floating))
    if mask.dtype == bool:
        return mask
    if np.isnan(mask).any():
        raise ValueError(f"{name}: {np.count_nonzero(np.isnan(mask))} of its {mask.size} values are NaN")
    mask, cut = mask.astype(np.float64), threshold
    if values == "logits":
        mask, cut = mask.clip(-1e6, 1e6), math.log(threshold / (1 - threshold))  # infinities do not interpolate
    elif mask.min() < 0 or mask.max() > 1:
        raise ValueError(f"{name}: probabilities from {mask.min():g} to {mask.max():g}, expected 0 to 1")
    return (mask if size in (None, mask.shape) else resize_bilinear(mask, size)) > cut


def _checked(mask: Any, name: str, size: tuple[int, ...] | None, kinds: tuple[type, ...]) -> np.ndarray:
    """A mask as an array of such a kind; booleans of that size."""
    mask = np.asarray(mask)
    if not any(np.issubdtype(mask.dtype, kind) for kind in kinds):
        raise ValueError(f"{name}: expected booleans, got {mask.dtype}")
    if mask.ndim != 2 or 0 in mask.shape:
        raise ValueError(f"{name}: expected two dimensions, (height, width), got shape {mask.shape}")
    if mask.dtype == bool and size not in (None, mask.shape):
        raise ValueError(f"{name}: its size {mask.shape} is not {size}, that of the masks before it")
    return mask


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values)
