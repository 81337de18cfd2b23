"""The size of an ultrasound picture's pixels: from its calibrated regions, where these leave no doubt."""

from pathlib import Path

import numpy as np
import pytest

from medsight.scans import open_scan
from tests.medsight.scans.scan_files import dicom_bytes, dicom_dataset


pydicom = pytest.importorskip("pydicom")

ROWS, COLUMNS = 40, 50
WHOLE = (0, 0, COLUMNS - 1, ROWS - 1)
UPPER, LOWER = (5, 2, 45, 19), (5, 20, 45, 39)


def region(corners: tuple = WHOLE, down: float = 0.02, across: float = 0.03, **changes: object) -> "pydicom.Dataset":
    """A region as DICOM has them: corners (x0, y0, x1, y1), steps in cm."""
    item = pydicom.Dataset()
    item.RegionSpatialFormat, item.RegionDataType = 1, 1
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3
    item.RegionLocationMinX0, item.RegionLocationMinY0, item.RegionLocationMaxX1, item.RegionLocationMaxY1 = corners
    item.PhysicalDeltaX, item.PhysicalDeltaY = across, down
    for key, value in changes.items():
        setattr(item, key, value) if value is not None else delattr(item, key)
    return item


def spacing(regions: list, **elements: object) -> tuple[float, float] | None:
    dataset = dicom_dataset(np.zeros((ROWS, COLUMNS, 3), np.uint8), Modality="US", **elements)
    dataset.SequenceOfUltrasoundRegions = regions
    return open_scan(dicom_bytes(dataset)).pixel_spacing


CLEAR = {
    "whole": [region()],
    "whole, ends excluded": [region((0, 0, COLUMNS, ROWS))],
    "part": [region(UPPER)],
    "two": [region(UPPER), region(LOWER)],
    "two, rounded": [region(UPPER), region(LOWER, 0.02001, 0.03001)],
    "downwards": [region(UPPER, -0.02, -0.03)],
    "colour flow": [region(UPPER, RegionDataType=2)],
}
DOUBTFUL = {
    "none": [],
    "two scales": [region(UPPER), region(LOWER, 0.03, 0.03)],
    "spectrum beside it": [region(UPPER), region(LOWER, RegionSpatialFormat=3)],
    "seconds": [region(UPPER), region(LOWER, PhysicalUnitsXDirection=4)],
    "no unit": [region(UPPER), region(LOWER, PhysicalUnitsYDirection=0)],
    "M-mode": [region(RegionSpatialFormat=2)],
    "no step": [region(UPPER, down=0.0)],
    "one step": [region(UPPER, PhysicalDeltaX=None)],
    "no corner": [region(UPPER, RegionLocationMaxX1=None)],
    "of a larger picture": [region((0, 0, 2 * COLUMNS, 2 * ROWS))],
    "inside out": [region((30, 5, 20, 10))],
}


@pytest.mark.parametrize("kind", [*CLEAR, *DOUBTFUL])
def test_regions_say_how_large_a_pixel_is_if_they_leave_no_doubt(kind: str) -> None:
    if kind in CLEAR:
        assert spacing(CLEAR[kind]) == pytest.approx((0.2, 0.3), rel=0.01)
    else:
        assert spacing(DOUBTFUL[kind]) is None


def test_the_pixels_own_spacing_goes_first() -> None:
    assert spacing([region()], PixelSpacing=[0.5, 0.6]) == (0.5, 0.6)


def test_files_of_other_scales_have_none_in_common(tmp_path: Path) -> None:
    for name, step in (("a", 0.02), ("b", 0.05)):
        dataset = dicom_dataset(np.zeros((ROWS, COLUMNS), np.uint8), Modality="US")
        dataset.SequenceOfUltrasoundRegions = [region(down=step, across=step)]
        (tmp_path / name).write_bytes(dicom_bytes(dataset))
    assert open_scan(tmp_path / "b").pixel_spacing == pytest.approx((0.5, 0.5))
    assert open_scan(tmp_path).pixel_spacing is None
