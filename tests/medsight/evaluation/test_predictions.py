"""predictions.jsonl: run-length encodings, appending, and what does not fit."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsight.evaluation.predictions import (
    Prediction,
    append_predictions,
    decode_mask,
    drop_partial_line,
    encode_mask,
    match_predictions,
    read_predictions,
)


def runs_by_hand(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed counts: column by column, the first run of zeros."""
    runs = [(value, len(list(pixels))) for value, pixels in groupby(mask.T.reshape(-1).tolist())]
    return [*([0] if runs[0][0] else []), *(length for _, length in runs)]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_masks_come_back_and_agree_with_runs_counted_by_hand(share: float) -> None:
    mask = np.random.default_rng(1).random((37, 53)) < share
    encoded = encode_mask(mask)
    assert encoded["size"] == [37, 53] and json.loads(json.dumps(encoded)) == encoded
    assert np.array_equal(decode_mask(encoded, "it", (37, 53)), mask)
    assert np.array_equal(decode_mask({"size": [37, 53], "counts": runs_by_hand(mask)}, "it", (37, 53)), mask)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        ("x", "expected COCO RLE"),
        ({"size": [4, 4]}, "expected COCO RLE"),
        ({"size": [4, 4], "counts": ""}, "not fill 4 x 4"),
        ({"size": [4, 4], "counts": "0140"}, "not fill 4 x 4"),  # the library would read on into other memory
        ({"size": [4, 4], "counts": "zz!"}, "not fill 4 x 4"),
        ({"size": [4, 4], "counts": "é"}, "not fill 4 x 4"),
        ({"size": [4, 4], "counts": [16, 1]}, "not fill 4 x 4"),
        ({"size": [4, 4], "counts": [20, -4]}, "not fill 4 x 4"),
        ({"size": [4, 4], "counts": [16.0]}, "not fill 4 x 4"),
        ({"size": [0, 4], "counts": []}, "at least 1 each"),
        ({"size": [4], "counts": "`0"}, "size .height, width"),
    ],
)
def test_malformed_encodings_are_refused(encoded: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"row 7: .*{message}"):
        decode_mask(encoded, "row 7", (4, 4))


def test_a_mask_of_another_size_is_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match="the mask is 4 x 4 pixels .height x width., its image 4 x 5"):
        decode_mask(encode_mask(np.ones((4, 4), dtype=bool)), "mask 1", (4, 5))


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    drop_partial_line(path)
    append_predictions(path, [Prediction("a", "ä"), Prediction("b", "two")])
    whole = path.read_bytes()
    for cut in (whole[:-9], whole + b"x" * 200_000):  # also a long one, and none that is whole
        path.write_bytes(cut)
        drop_partial_line(path)
        assert path.read_bytes() == whole[: cut.rindex(b"\n") + 1]
    path.write_bytes(b"x" * 200_000)
    drop_partial_line(path)
    append_predictions(path, [Prediction("c", "three")])
    assert [prediction.id for _, prediction in read_predictions(path)] == ["c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not a JSON object"),
        ("[]", "line 2: expected a JSON object, got list"),
        ('{"answer": "x"}', "line 2: expected text in 'id'"),
        ('{"id": "b", "answer": null}', "line 2: expected text in 'answer'"),
        ('{"id": "b", "answer": "", "masks": {}}', "line 2: expected a list in 'masks'"),
        ('{"id": "b", "answer": "", "codes": ["[C0_1]"]}', "line 2: 1 codes for 0 masks"),
        ('{"id": "b", "answer": "", "masks": [{}], "codes": [5]}', "line 2: expected text in 'codes', got 5"),
        ('{"id": "b", "answer": "", "masks": [{}], "codes": ["SEG1"]}', "line 2: codes: 'SEG1' is not a region code"),
        ('{"id": "b", "answer": "", "masks": [{}], "groups": [2]}', "line 2: expected text in 'groups', got 2"),
        ('{"id": "b", "answer": "", "masks": [{}], "scores": ["x"]}', "line 2: expected numbers in 'scores', got 'x'"),
        ('{"id": "b", "answer": "", "reference_codes": ["red"]}', "reference_codes: 'red' is not a region code"),
        ('{"id": "b", "answer": "", "reference_codes": "[C0_1]"}', "expected a list in 'reference_codes', got str"),
        ('{"id": "b", "answer": "", "group": 3}', "line 2: expected text in 'group', got 3"),
        ('{"id": "b", "answer": "", "is_complete": "yes"}', "expected true or false in 'is_complete', got 'yes'"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "saved.jsonl"
    path.write_text('{"id": "a", "answer": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(read_predictions(path))


def test_missing_extra_duplicate_and_empty_rows_are_told_apart() -> None:
    given = [("f, line 1", Prediction("a", "x")), ("f, line 2", Prediction("a", "y"))]
    given += [("f, line 3", Prediction("z", "x")), ("f, line 4", Prediction("b", " "))]
    found, problems = match_predictions(["a", "b", "c"], given)
    assert (found["a"].answer, set(found)) == ("x", {"a", "b"})
    assert (problems.missing, problems.extra, problems.duplicate) == (["c"], ["z (line 3)"], ["a (line 2)"])
    assert problems.empty == ["b"] and "empty" not in problems.refused()
    assert problems.to_text() == "1 missing (c), 1 extra (z (line 3)), 1 duplicate (a (line 2))"
