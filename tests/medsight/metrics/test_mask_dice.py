"""Each preset and flag against hand-worked masks, their quirks by name, and against a slow implementation."""

import math
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch

from medsight.metrics import load
from medsight.metrics.mask_dice.mask_counts import PRESETS, choose_protocol, resize_bilinear, score_item


def strip(*pixels: int) -> np.ndarray:
    """One row of ten pixels with these inside."""
    mask = np.zeros((1, 10), dtype=bool)
    mask[0, list(pixels)] = True
    return mask


def square(top: int, left: int, side: int = 20, size: int = 60) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


A, B, C, EMPTY = strip(0, 1, 2, 3), strip(2, 3, 4, 5), strip(8, 9), strip()


def test_dice_and_iou_of_half_overlapping_masks() -> None:
    item = score_item([A], [B])
    assert (item["dice"], item["iou"]) == (1 / 2, 1 / 3)
    assert (item["intersection"], item["predicted_area"], item["reference_area"]) == (2, 4, 4)
    assert (item["n_predicted"], item["n_references"], item["thresholded"]) == (1, 1, False)


@pytest.mark.parametrize(
    ("multi", "predicted", "references", "expected"),
    [
        ("mean", [A, B, C], [A], (1 + 1 / 2 + 0) / 3),
        ("mean", [A], [A, C], 2 * 4 / (4 + 6)),  # one mask with the union of both references
        ("union", [A, C], [A], 2 * 4 / (6 + 4)),
        ("union", [A, C], [C, A], 1.0),
        ("best", [A, B, C], [A], 1.0),
        ("best", [B], [A, C], (1 / 2 + 0) / 2),
        ("order", [A, C], [A, C], 1.0),
        ("order", [A, C], [C, A], 0.0),
        ("order", [A, C], [A], 1 / 2),  # C has no partner
        ("order", [A], [A, C], 1 / 2),
        ("first", [A, C], [A], 1.0),
        ("first", [C, A], [A], 0.0),
        ("last", [C, A], [A, A], 1.0),
        ("last", [C, A], [A], 0.0),  # only the first pair is reached by both
    ],
)
def test_several_masks(multi: str, predicted: list[np.ndarray], references: list[np.ndarray], expected: float) -> None:
    assert score_item(predicted, references, multi=multi)["dice"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("multi", ["mean", "union", "best", "order", "first", "last", "single"])
def test_plain_both_empty_scores_1_and_one_empty_0(multi: str) -> None:
    for predicted, references in (([], []), ([EMPTY], [EMPTY]), ([], [EMPTY]), ([EMPTY], [])):
        item = score_item(predicted, references, multi=multi)
        assert (item["dice"], item["iou"]) == (1.0, 1.0)
    for predicted, references in (([], [A]), ([A], []), ([EMPTY], [A]), ([A], [EMPTY])):
        item = score_item(predicted, references, multi=multi)
        assert (item["dice"], item["iou"]) == (0.0, 0.0)


def test_a_missing_mask_is_0_or_skipped() -> None:
    assert score_item([], [A], missing="zero")["dice"] == 0.0
    skipped = score_item([], [A], missing="skip", spacing_mm=(1, 1))
    assert (skipped["dice"], skipped["iou"], skipped["surface_dice"]) == (None, None, None)
    assert skipped["reason"] == "no mask in the answer"
    assert score_item([EMPTY], [A], missing="skip")["dice"] == 0.0  # an empty mask is not a missing one


TENTH = math.log(0.1 / 0.9)


@pytest.mark.parametrize(
    ("preset", "predicted", "references", "expected"),
    [
        ("medsight", [A, B], [A], (1 + (4 + 1e-8) / (8 + 1e-8)) / 2),  # mean over all cited codes
        ("medsight", [], [A], 0.0),
        ("medsight", [np.where(A, 0.01, 0.0)], [A], 1.0),  # logits above 0
        ("medsight", [np.where(A, TENTH + 1e-6, TENTH - 1e-6)], [A], 1e-8 / (4 + 1e-8)),
        ("medplib", [np.where(A, TENTH + 1e-6, TENTH - 1e-6)], [A], 1.0),  # quirk: the threshold is a tenth
        ("medplib", [C, A], [A, B], 2 * (2 / 6) / (1 + 2 / 6)),  # quirk: the last pair, and Dice from IoU
        ("medplib", [EMPTY], [EMPTY], 0.0),  # quirk: an empty union scores 0
        ("citrus", [B, A], [A], 1 / 2),  # the first mask, an empty one where there is none
        ("citrus", [], [A], 0.0),
        ("citrus", [], [EMPTY], 1.0),
        ("citrus", [], [], 1.0),
        ("biomedparse", [A], [A], 8 / (8 + 1e-6)),  # the denominator alone is smoothed
        ("biomedparse", [EMPTY], [EMPTY], 0.0),
        ("biomedparse", [A, B], [A], 0.0),  # one prompt, one mask
        ("biomedparse", [A], [A, B], None),
    ],
)
def test_presets_by_hand(preset: str, predicted: list[Any], references: list[Any], expected: float | None) -> None:
    item = score_item(predicted, references, preset=preset)
    assert item["dice"] == expected
    assert item["reason"] == (None if expected is not None else "several references where the protocol takes one")
    if preset == "medplib" and expected == 0:
        assert item["iou"] == 0.0


def test_presets_average_as_they_say() -> None:
    over_groups = {name for name, protocol in PRESETS.items() if protocol.average == "macro"}
    assert over_groups == {"medsight", "citrus", "named"} and {"medplib", "biomedparse"} < set(PRESETS)


@pytest.mark.parametrize("size", [(7, 9), (3, 4), (5, 5), (1, 13)])
def test_resizing_is_torchs_bilinear(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).normal(size=(5, 6))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], size=size, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(resize_bilinear(values, size), expected[0, 0].numpy(), atol=1e-12)


def test_logits_are_resized_before_the_threshold() -> None:
    logits = np.array([[3.0, -1.0]])  # between the centres: 3, 2, 0, -1
    item = score_item([logits], [np.array([[True, True, False, False]])])
    assert (item["dice"], item["predicted_area"], item["thresholded"]) == (1.0, 2, True)
    infinite = np.array([[np.inf, -np.inf]])
    assert score_item([infinite], [np.array([[True, True, False, False]])])["dice"] == 1.0


def test_probabilities_are_cut_at_the_threshold_itself() -> None:
    item = score_item([np.where(A, 0.4, 0.3)], [A], values="probabilities", threshold=0.35)
    assert item["dice"] == 1.0


def test_distances_of_a_shifted_square_by_hand() -> None:
    # Boundaries lie on the grid of pixel corners: 76 edge points of length 1 and 4 corners of length sqrt(2) / 2 each;
    # 18 edge points and a corner of each upright side coincide after a shift by two rows.
    corner = math.sqrt(2) / 2
    exact = 2 * (18 + corner) / (4 * 19 + 4 * corner)
    item = score_item([square(12, 10)], [square(10, 10)], spacing_mm=(1, 1), tolerance_mm=0)
    assert item["hd95_mm"] == 2.0
    assert item["surface_dice"] == pytest.approx(exact, abs=1e-12)
    assert score_item([square(12, 10)], [square(10, 10)], spacing_mm=(1, 1))["surface_dice"] == 1.0


SPECKLED = square(10, 10)
SPECKLED[55, 55] = True
NOTHING = np.zeros((60, 60), dtype=bool)


@pytest.mark.parametrize(
    ("predicted", "references", "spacing", "expected"),
    [
        ([square(12, 10)], [square(10, 10)], (0.5, 3), (1.0, 1.0)),  # millimetres of each axis
        ([square(10, 12)], [square(10, 10)], (0.5, 3), (6.0, None)),
        ([SPECKLED], [square(10, 10)], (1, 1), (0.0, None)),  # the maximum would not forgive the speck
        ([square(5, 5)], [square(5, 5)], (1, 1), (0.0, 1.0)),
        ([], [square(5, 5)], (1, 1), (None, 0.0)),
        ([square(5, 5)], [], (1, 1), (None, 0.0)),
        ([], [], (1, 1), (None, 1.0)),
        ([square(5, 5), NOTHING], [square(5, 5)], (1, 1), (None, 0.5)),
    ],
)
def test_distances(predicted: list[Any], references: list[Any], spacing: Any, expected: tuple[Any, Any]) -> None:
    item = score_item(predicted, references, spacing_mm=spacing)
    assert item["hd95_mm"] == expected[0]
    assert item["surface_dice"] < 1 if expected[1] is None else item["surface_dice"] == expected[1]


def test_distances_without_their_library_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert score_item([A], [A])["hd95_mm"] is None
    monkeypatch.setitem(sys.modules, "segmentationmetrics", None)
    with pytest.raises(ImportError, match=r"pip install 'medsight\[eval\]'"):
        score_item([A], [A], spacing_mm=(1, 1))
    assert score_item([A], [A])["dice"] == 1.0


@pytest.mark.parametrize(
    ("predicted", "references", "flags", "message"),
    [
        ([A], [strip()[:, :9]], {}, r"predicted mask 0: its size \(1, 10\) is not \(1, 9\)"),
        ([A], [A, strip()[:, :9]], {}, r"reference 1: its size \(1, 9\) is not \(1, 10\)"),
        ([A, A[:, :9]], [], {}, "predicted mask 1: its size"),
        ([np.full((1, 10), np.nan)], [A], {}, "predicted mask 0: 10 of its 10 values are NaN"),
        ([A.astype(int)], [A], {}, "predicted mask 0: expected booleans, got int64"),
        ([A], [A.astype(float)], {}, "reference 0: expected booleans, got float64"),
        ([A[0]], [A], {}, "expected two dimensions"),
        ([A * 2.0], [A], {"values": "probabilities"}, "probabilities from 0 to 2"),
        ([A * 2.0], [A], {"values": "mask"}, "choose logits or probabilities"),
        ([A], [A], {"threshold": 1.0}, "threshold 1.0: expected a probability"),
        ([A], [A], {"multi": "all"}, "multi='all': choose one of mean, union"),
        ([A], [A], {"missing": "one"}, "choose one of zero, skip"),
        ([A], [A], {"preset": "medsam"}, "preset 'medsam': choose one of medsight, medplib, citrus, biomedparse"),
        ([A], [A], {"preset": "citrus", "multi": "best"}, "preset 'citrus' fixes multi"),
        ([A], [A], {"spacing_mm": (1, 0)}, "spacing_mm"),
        ([A], [A], {"spacing_mm": (1, 1, 1)}, "spacing_mm"),
        ([A], [A], {"spacing_mm": (1, 1), "tolerance_mm": -1}, "tolerance_mm"),
    ],
)
def test_bad_masks_and_flags_are_refused(predicted: Any, references: Any, flags: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_item(predicted, references, **flags)


def test_the_result_has_both_means_groups_and_counts() -> None:
    items = [
        score_item([A], [A], spacing_mm=(1, 1), missing="skip"),
        score_item([B], [A], missing="skip"),
        score_item([], [A], missing="skip"),
        score_item([C], [A], missing="skip"),
    ]
    result = load("mask_dice").compute(items=items, groups=["CT", "CT", "CT", "MR"], missing="skip", average="macro")
    assert result["scores"] == [1.0, 0.5, None, 0.0]
    assert (result["dice_micro"], result["dice_macro"], result["dice"]) == (1.5 / 3, 0.75 / 2, 0.75 / 2)
    assert result["dice_pooled"] == 2 * (4 + 2) / (8 + 8 + 6)
    assert (result["iou_micro"], result["iou_macro"]) == pytest.approx((4 / 9, 1 / 3))
    assert (result["n"], result["scored"], result["refused"]) == (4, 3, 1)
    assert result["refusals"] == {"no mask in the answer": 1}
    assert (result["hd95_mm"], result["hd95_items"]) == (0.0, 1)
    assert (result["no_mask_rate"], result["masks_per_answer"], result["references_per_item"]) == (0.25, 0.75, 1.0)
    assert result["groups"]["CT"]["dice_micro"] == 0.75 and result["groups"]["CT"]["refused"] == 1
    assert result["protocol"] == "threshold=0.5 missing=skip multi=mean formula=plain average=macro"


ITEM, SMOOTHED = score_item([A], [A]), score_item([A], [A], preset="medplib")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"items": [SMOOTHED], "preset": "citrus"}, "expected items scored by threshold=0.5 multi=first"),
        ({"items": [SMOOTHED], "multi": "union"}, "expected items scored by multi=union"),
        ({"items": [SMOOTHED, ITEM], "preset": "medplib"}, "several protocols"),
        ({"items": [score_item([A], [A], preset="medsight")], "preset": "medsight"}, "macro average needs groups"),
        ({"items": [ITEM], "groups": ["CT", "MR"]}, "number of items .1. and groups .2."),
        ({"predictions": [[[[1]]]], "references": [[[[1]]]]}, "no items to score: .* pass items, the records of"),
    ],
)
def test_items_that_cannot_be_counted_together_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("mask_dice").compute(**arguments)


Grid = list[list[float]]


def slow_inside(grid: Grid, y: int, x: int, height: int, width: int, cut: float) -> bool:
    """Whether a pixel of the resized grid lies above the cut."""
    if (len(grid), len(grid[0])) == (height, width):
        return grid[y][x] > cut
    total = 0.0
    at_y = min(max((y + 0.5) * len(grid) / height - 0.5, 0), len(grid) - 1)
    at_x = min(max((x + 0.5) * len(grid[0]) / width - 0.5, 0), len(grid[0]) - 1)
    for j, row in enumerate(grid):
        for i, value in enumerate(row):
            total += value * max(0, 1 - abs(at_y - j)) * max(0, 1 - abs(at_x - i))
    return total > cut


def slow_item(predicted: list[Grid], references: list[list[list[bool]]], name: str) -> float | None:
    """Dice of one item by a preset, once more, a pixel at a time, in plain Python."""
    height, width = len(references[0]), len(references[0][0])
    nothing = [[False] * width] * height
    if name == "biomedparse" and len(references) > 1:
        return None
    if name == "biomedparse" and len(predicted) > 1:
        return 0.0
    if not predicted and any(any(map(any, reference)) for reference in references):
        return 0.0
    first: Grid | None = predicted[0] if predicted else None
    pairs: list[tuple[Grid | None, list[list[list[bool]]]]] = [(first, references[:1])]
    if name == "medsight":
        pairs = [(grid, references) for grid in predicted or [None]]
    if name == "medplib" and predicted:
        last = min(len(predicted), len(references)) - 1
        pairs = [(predicted[last], [references[last]])]
    if name == "named":
        pairs = []
        for place in range(max(len(predicted), len(references))):
            grid = predicted[place] if place < len(predicted) else None
            pairs.append((grid, [references[place] if place < len(references) else nothing]))
    scores = []
    for grid, wanted in pairs:
        i = p = g = 0
        for y in range(height):
            for x in range(width):
                cut = -math.log(9) if name == "medplib" else 0.0
                said = grid is not None and slow_inside(grid, y, x, height, width, cut)
                true = any(reference[y][x] for reference in wanted)
                i, p, g = i + (said and true), p + said, g + true
        if name == "medsight":
            scores.append((2 * i + 1e-8) / (p + g + 1e-8))
        elif name == "medplib":
            iou = i / (p + g - i) if p + g - i else 0.0
            scores.append(2 * iou / (1 + iou))
        elif name == "biomedparse":
            scores.append(2 * i / (p + g + 1e-6))
        else:
            scores.append(1.0 if p + g == 0 else 2 * i / (p + g))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_thousand_made_up_masks_score_as_a_slow_implementation_scores_them(preset: str) -> None:
    draw = random.Random(7)

    def grid(height: int, width: int) -> Grid:
        offset = draw.choice([-3, -1, 0, 1])
        return [[draw.gauss(offset, 1) for _ in range(width)] for _ in range(height)]

    items, groups, expected = [], [], []
    for _ in range(1000):
        height, width = draw.randint(1, 4), draw.randint(1, 5)
        same = draw.random() < 0.7
        shapes = [
            (height, width) if same else (draw.randint(1, 3), draw.randint(1, 3)) for _ in range(draw.randint(0, 3))
        ]
        predicted = [grid(*shape) for shape in shapes]
        share = draw.choice([0, 0.5, 0.5, 1])
        references = [
            [[draw.random() < share for _ in range(width)] for _ in range(height)] for _ in range(draw.randint(1, 2))
        ]
        arrays = [np.array(one) for one in predicted], [np.array(one) for one in references]
        items.append(score_item(*arrays, preset=preset))
        groups.append(draw.choice(["CT", "MR", "US"]))
        expected.append(slow_item(predicted, references, preset))
    result = load("mask_dice").compute(items=items, groups=groups, preset=preset)
    assert result["scores"] == expected and result["preset"] == preset
    kept = [score for score in expected if score is not None]
    assert result["scored"] == len(kept) > 100 and len(set(kept)) > 20
    assert result["dice_micro"] == sum(kept) / len(kept)
    means = []
    for name in ("CT", "MR", "US"):
        own = [score for score, group in zip(expected, groups, strict=True) if group == name and score is not None]
        means.append(sum(own) / len(own))
    assert result["dice_macro"] == sum(means) / 3
    assert result["dice"] == result[f"dice_{choose_protocol(preset).average}"]
