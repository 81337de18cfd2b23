"""Single elements of a DICOM header, read with care: what is missing or holds something else is `None`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .windows import Window


TOLERANCE = 0.01  # of direction cosines, of spacings that are to be the same, of the distance between slices
_NARROWEST = {"LINEAR": 1, "LINEAR_EXACT": 1e-9, "SIGMOID": 1e-9}  # width of a window, by its function
_CENTIMETRES = 3  # of the physical units of an ultrasound region
_IMAGE_REGION = 1  # a two-dimensional picture: no trace over time
_REGION = (
    *("RegionSpatialFormat", "PhysicalUnitsXDirection", "PhysicalUnitsYDirection"),
    *("RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1", "RegionLocationMaxY1"),
    *("PhysicalDeltaX", "PhysicalDeltaY"),
)


def number_of_frames(dataset: Any) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def photometric_of(dataset: Any) -> str:
    return str(dataset.get("PhotometricInterpretation") or "")


def stored_range(dataset: Any) -> tuple[float, float]:
    """The lowest and highest value that a stored pixel can have."""
    bits, signed = int(dataset.get("BitsStored") or dataset.BitsAllocated), bool(dataset.get("PixelRepresentation"))
    return (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)


def code_of(value: Any) -> str | None:
    """A code string, if it is one: anything else might quote a person."""
    text = str(value or "").strip().upper()
    return text if 0 < len(text) <= 16 and all(c.isalnum() or c in "_ " for c in text) else None


def numbers_of(value: Any, count: int | None) -> tuple[float, ...] | None:
    """Finite numbers of an element; `None` where it is missing or holds something else."""
    try:
        numbers = tuple(float(v) for v in (value if isinstance(value, Sequence) else [value]))
    except (TypeError, ValueError):
        return None
    return numbers if numbers and len(numbers) == (count or len(numbers)) and np.isfinite(numbers).all() else None


def number_of(value: Any) -> float | None:
    """A finite number, likewise."""
    numbers = numbers_of(value, 1)
    return None if numbers is None else numbers[0]


def group_of(dataset: Any, frame: int, name: str) -> Any:
    """A functional group of a frame of an enhanced object: its own, or the shared one; {} where there is none."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for groups in (per_frame[frame] if frame < len(per_frame) else {}, shared[0] if len(shared) else {}):
        if group := groups.get(name):
            return group[0]
    return {}


def measures_of(dataset: Any, frame: int) -> Any:
    return group_of(dataset, frame, "PixelMeasuresSequence") or dataset


def position_of(dataset: Any, frame: int) -> np.ndarray | None:
    place = group_of(dataset, frame, "PlanePositionSequence") or dataset
    numbers = numbers_of(place.get("ImagePositionPatient"), 3)
    return None if numbers is None or (place is dataset and frame) else np.array(numbers)


def directions_of(dataset: Any, frame: int) -> np.ndarray | None:
    """(2, 3): unit vectors along a row and along a column, in DICOM's patient axes."""
    turn = group_of(dataset, frame, "PlaneOrientationSequence") or dataset
    numbers = numbers_of(turn.get("ImageOrientationPatient"), 6)
    if numbers is None:
        return None
    vectors = np.array(numbers).reshape(2, 3)
    unit = np.abs(vectors @ vectors.T - np.eye(2)).max() < 2 * TOLERANCE
    return vectors if unit else None


def orientation_of(dataset: Any, frame: int) -> str | None:
    """What lies at the right and at the bottom of a frame, by the nearest of the patient's axes; such as "LP"."""
    directions = directions_of(dataset, frame)
    if directions is None:
        return None
    across = int(np.argmax(np.abs(directions[0])))
    down = int(np.argmax(np.where(np.arange(3) == across, -1, np.abs(directions[1]))))
    pairs = zip((across, down), directions, strict=True)
    return "".join(("RL", "AP", "IS")[axis][int(vector[axis] > 0)] for axis, vector in pairs)


def spacing_of(dataset: Any, frame: int) -> tuple[float, float] | None:
    """mm between rows and between columns: of the pixels, or of the regions of an ultrasound picture."""
    stated = numbers_of(measures_of(dataset, frame).get("PixelSpacing"), 2)
    if stated is not None and min(stated) > 0:
        return stated[0], stated[1]
    regions = dataset.get("SequenceOfUltrasoundRegions") or []
    found = [_region_spacing(region, int(dataset.Rows), int(dataset.Columns)) for region in regions]
    known = [spacing for spacing in found if spacing is not None]
    if not known or len(known) < len(found) or np.ptp(known, axis=0).max() > TOLERANCE * np.min(known):
        return None
    return known[0]


def aspect_of(dataset: Any, frame: int) -> float:
    """A pixel's height over its width, by its spacing, in the patient or on the detector, or its aspect ratio."""
    others = (numbers_of(dataset.get(key), 2) for key in ("ImagerPixelSpacing", "PixelAspectRatio"))
    stated = (spacing_of(dataset, frame), *others)
    return next((sides[0] / sides[1] for sides in stated if sides is not None and min(sides) > 0), 1.0)


def _region_spacing(region: Any, rows: int, columns: int) -> tuple[float, float] | None:
    """The spacing of a two-dimensional region in cm; `None` if it exceeds the picture, which was scaled since then."""
    values = [number_of(region.get(key)) for key in _REGION]
    if None in values:
        return None
    kind, unit_across, unit_down, left, top, right, bottom, across, down = map(float, values)  # type: ignore[arg-type]
    known = kind == _IMAGE_REGION and unit_across == unit_down == _CENTIMETRES
    # Writers disagree on whether the last column belongs to the region.
    inside = 0 <= left < right <= columns and 0 <= top < bottom <= rows
    return (10 * abs(down), 10 * abs(across)) if known and inside and down and across else None


def voi_of(dataset: Any, frame: int) -> Any:
    """The part of the header that holds the window, or the VOI lookup table, of a frame."""
    voi = group_of(dataset, frame, "FrameVOILUTSequence")
    return voi if "WindowCenter" in voi or "VOILUTSequence" in voi else dataset


def window_of(voi: Any) -> Window | None:
    """The first window that is stated, if it is one."""
    centre, width = (numbers_of(voi.get(key), None) for key in ("WindowCenter", "WindowWidth"))
    function = code_of(voi.get("VOILUTFunction")) or "LINEAR"
    if not centre or not width or function not in _NARROWEST or width[0] < _NARROWEST[function]:
        return None
    return Window(centre[0], width[0], function)
