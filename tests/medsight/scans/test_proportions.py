"""Slices whose pixels are not square: shown in true proportions; their masks return to their own pixels."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medsight.export import measure, overlay
from medsight.inference.prediction import found_regions
from medsight.inference.predictor import Predictor, read_slices
from medsight.scans import open_scan
from processing_medsight.grounded_answer_medsight import GroundedAnswer, GroundedRegion
from tests.medsight.scans.scan_files import dicom_bytes, dicom_dataset, functional_group, nifti_bytes, write_series


pytest.importorskip("nibabel")
pytest.importorskip("pydicom")

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 1000, (20, 30)).astype(np.uint16)
FRAMES = np.stack([PIXELS] * 3)


def of_dicom(pixels: np.ndarray = PIXELS, **elements: Any) -> bytes:
    return dicom_bytes(dicom_dataset(pixels, **elements))


def measured(*spacings: list[float]) -> dict[str, Any]:
    return {
        "PerFrameFunctionalGroupsSequence": [
            functional_group("PixelMeasuresSequence", PixelSpacing=spacing) for spacing in spacings
        ]
    }


NIFTI = nifti_bytes(RNG.integers(0, 1000, (30, 24, 20)).astype(np.int16), np.diag([0.7, 0.9, 5, 1]))
OBLONG = {  # source, plane, and (width, height) of what is shown of it
    "axial": (NIFTI, "axial", (30, 31)),
    "coronal": (NIFTI, "coronal", (30, 143)),
    "sagittal": (NIFTI, "sagittal", (24, 111)),
    "spacing": (of_dicom(PixelSpacing=[0.7, 5]), None, (214, 20)),
    "detector": (of_dicom(Modality="DX", ImagerPixelSpacing=[0.3, 0.1]), None, (30, 60)),
    "ratio": (of_dicom(Modality="US", PixelAspectRatio=["4", "3"]), None, (30, 27)),
    "spacing before ratio": (of_dicom(PixelSpacing=[1, 1], PixelAspectRatio=["4", "3"]), None, (30, 20)),
    "frames": (of_dicom(FRAMES, **measured([3, 1], [3, 1], [3, 1])), None, (30, 60)),
    "colours": (of_dicom(RNG.integers(0, 256, (20, 30, 3), np.uint8), PixelSpacing=[2, 1]), None, (30, 40)),
    "nearly square": (of_dicom(PixelSpacing=[1.01, 1]), None, (30, 20)),
}


@pytest.mark.parametrize("kind", list(OBLONG))
def test_a_slice_is_shown_in_true_proportions_and_its_masks_return_to_its_own_pixels(kind: str) -> None:
    source, plane, size = OBLONG[kind]
    scan = open_scan(source, plane=plane)
    index = scan.num_slices // 2
    picture = scan.slice_image(index)
    assert picture.size == scan.picture_size == size
    mask = RNG.random((scan.height, scan.width)) > 0.5
    shown = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    assert np.array_equal(scan.to_grid(shown), mask) and np.array_equal(scan.to_grid(mask), mask)
    assert np.array_equal(scan.to_source({index: shown}), scan.to_source({index: mask}))
    for wrong in (mask[1:], shown.astype(np.uint8)):
        with pytest.raises(ValueError, match="mask of .*: expected"):
            scan.to_grid(wrong)


@pytest.mark.parametrize("kind", ["coronal", "spacing", "ratio"])
def test_the_model_sees_true_proportions_and_answers_on_the_slices_own_pixels(kind: str) -> None:
    source, plane, size = OBLONG[kind]
    scan = open_scan(source, plane=plane)
    (shown,) = read_slices(scan)
    assert shown.image.size == size
    mask = torch.zeros(size[::-1], dtype=torch.bool)
    mask[: size[1] // 2] = True  # the upper half
    region = GroundedRegion("[C0_1]", 1, 0, 1, None, "half", None, 0, mask, (0, 0, *size), int(mask.sum()), 0.5)
    predictor = Predictor.__new__(Predictor)
    predictor.model_name = "a model"
    prediction = predictor.prediction(GroundedAnswer("half", "half", [region]), shown, "Segment.", "image")
    (answered,) = prediction.answer.regions
    height = scan.height // 2
    assert answered.mask.shape == (scan.height, scan.width) and answered.box == (0, 0, scan.width, height)
    assert answered.area == height * scan.width
    regions = found_regions([prediction])
    area = None if scan.pixel_mm2 is None else pytest.approx(height * scan.width * scan.pixel_mm2)
    assert measure(scan, regions).area_mm2 == [area]
    drawn = np.asarray(overlay(prediction.image, regions), dtype=int)
    assert drawn.shape[0] >= size[1]  # of what is shown, not of the slice


@pytest.mark.parametrize(
    ("elements", "pixels"),
    [({"PixelSpacing": [1000, 1]}, PIXELS), (measured([3, 1], [1, 1], [1, 1]), FRAMES)],
    ids=["out of all proportion", "another in each frame"],
)
def test_pixels_that_cannot_be_drawn_out_are_shown_as_stored_with_a_warning(
    elements: dict, pixels: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        scan = open_scan(of_dicom(pixels, **elements), "upload")
    assert scan.picture_size == (30, 20) and "upload: its pixels are 1" in caplog.text
    assert (scan.pixel_spacing is None) == (pixels is FRAMES)  # no frame's spacing is taken for another's


def test_a_series_is_drawn_out_alike(tmp_path: Path) -> None:
    write_series(tmp_path, FRAMES, list("abc"))  # 1.5 x 0.5 mm
    scan = open_scan(tmp_path)
    assert {scan.slice_image(index).size for index in range(3)} == {(30, 60)}
