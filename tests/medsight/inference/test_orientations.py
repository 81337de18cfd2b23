"""Volumes are cut as a model learnt what is asked for, or the user is asked, or warned."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsight.inference.orientations import LearntOrientations, open_as_learnt
from medsight.scans import open_scan
from tests.medsight.scans.scan_files import ct_volume, nifti_bytes


pytest.importorskip("nibabel")
LEARNT = LearntOrientations(
    ["CT torso", "CT extremity", "MRI torso", "MRI brain", "MRI heart"],
    {"CT torso": "LP", "CT extremity": "LP", "MRI torso": "LP", "MRI brain": "AI"},
    {
        "MRI brain": {"anterior hippocampus"},
        "CT torso": {"left hip", "liver"},
        "MRI torso": {"liver"},
        "MRI heart": {"apex"},
    },
)
CT = nifti_bytes(ct_volume())
MR = nifti_bytes(np.random.default_rng(0).integers(0, 900, (5, 6, 7), dtype=np.int16))


@pytest.mark.parametrize(
    ("content", "prompt", "groups", "expected"),
    [
        (MR, "Segment both HIPPOCAMPUS parts.", None, "AI"),  # and no hip
        (MR, "Segment the livers.", None, "LP"),
        (MR, "Segment the apex.", None, "LP"),  # learnt in no known plane: as ever
        (MR, "What is it?", ["MRI brain"], "AI"),
        (MR, "What is it?", [3], "AI"),
        (CT, "What is it?", None, "LP"),
        (MR, "What is it?", None, None),
        (MR, "What is it?", "predicted", None),
    ],
)
def test_a_volume_is_cut_as_what_is_asked_for_was_learnt_or_the_plane_is_asked_for(
    content: bytes, prompt: str, groups: Any, expected: str | None
) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=r"bytes: which plane\? .*MRI torso from axial .*MRI brain from sagittal"):
            open_as_learnt(content, LEARNT, None, prompt, groups)
    else:
        assert open_as_learnt(content, LEARNT, None, prompt, groups).orientation == expected
    assert open_as_learnt(content, LearntOrientations(), None, prompt, groups).orientation == "LP"


@pytest.mark.parametrize(("plane", "warned"), [("axial", True), ("sagittal", True), ("AI", False)])
def test_another_plane_than_the_learnt_one_is_used_with_a_warning(
    plane: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        scan = open_as_learnt(MR, LEARNT, plane, "Segment the hippocampus.")
    assert scan.orientation == open_scan(MR, plane=plane).orientation
    assert ("the model learnt MRI brain from sagittal slices (AI)" in caplog.text) == warned


def test_what_is_no_volume_is_shown_as_it_is() -> None:
    assert open_as_learnt(ct_volume(), LEARNT, None, "Segment the hippocampus.").orientation is None


def test_the_shipped_model_finds_the_hippocampus_of_a_volume_without_being_told_the_plane(shared_data: Path) -> None:
    from medsight import Predictor

    nibabel = pytest.importorskip("nibabel")
    name, folder = "hippocampus_001.nii.gz", shared_data / "volumes/msd_hippocampus"
    labels = np.asanyarray(nibabel.load(folder / "labels" / name).dataobj) == 1
    index = int(labels.sum((1, 2)).argmax())
    found = Predictor(device="cpu")(folder / "images" / name, "Segment the anterior hippocampus.", slices=index)
    mask = found.scan.to_source({index: np.asarray(found.answer.regions[0].mask)})
    assert 2 * (mask & labels)[index].sum() / (mask.sum() + labels[index].sum()) > 0.9
