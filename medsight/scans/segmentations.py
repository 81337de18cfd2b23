"""What DICOM segmentations and structure sets show, on the grid of the images that they are of."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from processing_medsight.image_loading_medsight import MAX_IMAGE_PIXELS

from . import dicom_header
from .dicom import DicomScan
from .dicom_file import RefusedError, guarded, read_header, read_whole
from .scan import MAX_VOXELS


logger = logging.get_logger(__name__)

INSIDE = 0.5  # of a fraction, or a probability
_AREAS = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_OFF_PLANE = 0.1  # of the distance between slices, by which the points of a contour may miss theirs
_MOST_CROSSINGS = 2**26  # of the edges of a contour with the rows of a picture


def segments(path: Path, name: str, scan: DicomScan) -> Iterator[tuple[str, int, np.ndarray]]:
    """The segments of a DICOM segmentation: binary, of fractions, or a label map.

    They are put on the images that their frames say that they were derived from; or, where they do not say it of every
    frame, or of other images, by their place in the patient.

    Args:
        name: what to call the file in an error.
        scan: the images.

    Yields:
        The label and number of a segment, and bool in the shape of `Scan.to_source`: what is at least half inside.

    Raises:
        ValueError: the file is damaged or no segmentation, or lies on another grid than the images.
    """
    header = read_header(path, name, segmentation=True)
    _check_size(scan)
    try:
        import highdicom
    except ImportError as error:
        raise RefusedError(
            f'{name} is a segmentation, which needs highdicom: pip install "medsight[medical]"'
        ) from error
    with guarded(name, "it is no DICOM segmentation, or a damaged one"):
        described = [(str(item.SegmentLabel).strip(), int(item.SegmentNumber)) for item in header.SegmentSequence]
        by_source = _refers_to(header, scan)
        segmentation = highdicom.seg.segread(path, lazy_frame_retrieval=True)
    if not by_source and scan.affine is None:
        raise RefusedError(
            f"{name}: its frames do not say which images of {scan.name} they are of, nor do these where"
        )
    for label, number in described:
        if number == 0:  # of a label map: the background
            continue
        with guarded(name, f"it does not lie on the grid of its images, {scan.name}, or is damaged"):
            values = _by_source(segmentation, number, scan) if by_source else _by_place(segmentation, number, scan)
        shape = scan.num_slices, scan.height, scan.width
        if values.shape != shape:
            raise RefusedError(f"{name} has frames of {values.shape[1:]}, and its images {scan.name} of {shape[1:]}")
        yield label, number, values >= INSIDE


def _check_size(scan: DicomScan) -> None:
    voxels = scan.num_slices * scan.height * scan.width
    if voxels > MAX_VOXELS or scan.height * scan.width > MAX_IMAGE_PIXELS:
        raise RefusedError(f"{scan.name} has {voxels:,} voxels: labels of at most {MAX_VOXELS:,} are read")


def _refers_to(header: Any, scan: DicomScan) -> bool:
    """Whether each frame of a segmentation says which one of these images it was derived from, pixel by pixel."""
    images = {str(image.SOPInstanceUID) for image in scan.dicom_datasets()}
    for frame in range(dicom_header.number_of_frames(header)):
        derived = dicom_header.group_of(header, frame, "DerivationImageSequence")
        sources = derived.get("SourceImageSequence") or []
        if len(sources) != 1 or sources[0].ReferencedSOPInstanceUID not in images:
            return False
        if sources[0].get("SpatialLocationsPreserved") != "YES":
            return False
    return True


def _by_source(segmentation: Any, number: int, scan: DicomScan) -> np.ndarray:
    images = scan.dicom_datasets()
    asked = {"segment_numbers": [number], "assert_missing_frames_are_empty": True}
    if len(images) == 1 and scan.num_slices > 1:
        frames = range(1, scan.num_slices + 1)
        found = segmentation.get_pixels_by_source_frame(images[0].SOPInstanceUID, frames, **asked)
    else:
        found = segmentation.get_pixels_by_source_instance([image.SOPInstanceUID for image in images], **asked)
    values: np.ndarray = found[..., 0]
    return values


def _by_place(segmentation: Any, number: int, scan: DicomScan) -> np.ndarray:
    from highdicom import VolumeGeometry

    volume = segmentation.get_volume(segment_numbers=[number])
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(scan.affine)  # DICOM's axes go to the left and to the back
    shape = scan.num_slices, scan.height, scan.width
    frame = scan.dicom_datasets()[0].get("FrameOfReferenceUID")
    geometry = VolumeGeometry(affine, shape, "PATIENT", frame_of_reference_uid=frame)
    values: np.ndarray = volume.match_geometry(geometry, tol=dicom_header.TOLERANCE).array[..., 0]
    return values


def regions_of_interest(path: Path, name: str, scan: DicomScan) -> Iterator[tuple[str, int, np.ndarray]]:
    """The regions of interest of a DICOM RT structure set.

    A pixel is inside where its centre lies inside a closed contour. A contour that lies wholly inside another one of
    its region is a hole, as planning systems write it. Points and lines have no area; a warning counts them.

    Args and yields: as `segments`, in the order of the file.

    Raises:
        ValueError: the file is damaged or no structure set, or a contour lies on none of the images.
    """
    with guarded(name, "it is no RT structure set, or a damaged one"):
        structures = read_whole(path, name)
        names = {int(item.ROINumber): str(item.ROIName).strip() for item in structures.StructureSetROISequence}
        listed = list(structures.get("ROIContourSequence") or [])
    _check_size(scan)
    places = _Places(scan, name)
    without_area = 0
    for item in listed:
        with guarded(name, "it has a damaged contour"):
            number = int(item.ReferencedROINumber)
            contours = list(item.get("ContourSequence") or [])
            areas = [contour for contour in contours if contour.get("ContourGeometricType") in _AREAS]
            without_area += len(contours) - len(areas)
            drawn: dict[int, list[np.ndarray]] = {}
            for contour in areas:
                index, points = places.locate(contour)
                drawn.setdefault(index, []).append(points)
            mask = np.zeros((scan.num_slices, scan.height, scan.width), dtype=bool)
            for index, outlines in drawn.items():
                mask[index] = with_holes([inside_contour(points, mask.shape[1:]) for points in outlines])
        yield names.get(number, f"ROI {number}"), number, mask
    if without_area:
        logger.warning(f"{name}: {without_area} of its contours are points or lines: they have no area, and no mask")


class _Places:
    """Where the slices of a scan lie, to find that of a contour."""

    def __init__(self, scan: DicomScan, name: str) -> None:
        self.name, self.scan = name, scan
        headers = scan.dicom_datasets()
        frames = [(headers[i], 0) if len(headers) > 1 else (headers[0], i) for i in range(scan.num_slices)]
        with guarded(scan.name, "its header is damaged"):
            positions = [dicom_header.position_of(*frame) for frame in frames]
            directions = dicom_header.directions_of(*frames[0])
            spacing = dicom_header.spacing_of(*frames[0])
            # A frame goes by its number as well.
            self.by_reference = {
                (str(header.SOPInstanceUID), frame if len(headers) == 1 and len(frames) > 1 else 0): i
                for i, (header, frame) in enumerate(frames)
            }
        if directions is None or spacing is None or any(position is None for position in positions):
            raise RefusedError(f"{scan.name} does not say where its slices lie, as {name} needs it")
        self.positions, self.directions, self.spacing = np.array(positions), directions, spacing
        self.normal = np.cross(*directions)
        distances = np.diff(np.sort(self.positions @ self.normal))
        between = distances[distances > 0]
        self.tolerance = _OFF_PLANE * float(between.min() if between.size else scan.slice_spacing or 1)

    def locate(self, contour: Any) -> tuple[int, np.ndarray]:
        """The slice that a contour lies on, and its points as (column, row), 0 at the centre of the first pixel."""
        points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
        if not np.isfinite(points).all() or len(points) < 1:
            raise RefusedError(f"{self.name} has a contour without points, or with some at infinity")
        away = np.abs((self.positions - points[0]) @ self.normal)
        images = contour.get("ContourImageSequence") or []
        keys = [
            (str(image.ReferencedSOPInstanceUID), int(image.get("ReferencedFrameNumber") or 1) - 1) for image in images
        ]
        index = next((self.by_reference[key] for key in keys if key in self.by_reference), int(np.argmin(away)))
        across = (points - self.positions[index]) @ np.stack([*self.directions, self.normal], axis=1)
        if np.abs(across[:, 2]).max() > self.tolerance:
            raise RefusedError(f"{self.name} has a contour that lies on none of the slices of {self.scan.name}")
        return index, across[:, :2] / self.spacing[::-1]


def inside_contour(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie inside a closed contour, by the rule of even and odd.

    Args:
        points: (n, 2) column and row, 0 at the centre of the first pixel.
        shape: (height, width).

    Returns:
        (height, width) bool.
    """
    low = np.floor(points.min(axis=0)).clip(0, shape[::-1]).astype(np.int64)
    high = np.ceil(points.max(axis=0)).clip(low, shape[::-1]).astype(np.int64)
    inside = np.zeros(shape, dtype=bool)
    inside[low[1] : high[1] + 1, low[0] : high[0] + 1] = _filled(points - low, *(high - low + 1)[::-1])[
        : shape[0] - low[1], : shape[1] - low[0]
    ]
    return inside


def _filled(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """`inside_contour` of (height, width): whatever is left of a pixel's centre and crosses its row turns it over."""
    ends = np.stack([points, np.roll(points, -1, axis=0)])
    upper, lower = np.take_along_axis(ends, np.argsort(ends[:, :, 1], axis=0)[:, :, None], axis=0)
    first, last = (np.ceil(end[:, 1]).clip(0, height).astype(np.int64) for end in (upper, lower))
    rows = last - first
    if rows.sum() > _MOST_CROSSINGS:
        raise RefusedError(f"a contour of {len(points):,} points crosses {rows.sum():,} rows: too many")
    edge = np.repeat(np.arange(len(points)), rows)
    row = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows) + first[edge]
    slope = (lower - upper)[edge, 0] / (lower - upper)[edge, 1]
    crossing = np.ceil(upper[edge, 0] + (row - upper[edge, 1]) * slope).clip(0, width).astype(np.int64)
    flips = np.zeros((height, width + 1), dtype=np.int32)
    np.add.at(flips, (row, crossing), 1)
    return np.cumsum(flips, axis=1)[:, :width] % 2 == 1


def with_holes(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Areas together, of which one that lies wholly inside a larger one is a hole."""
    whole, drawn = np.zeros_like(parts[0]), set[bytes]()
    for part in sorted(parts, key=lambda part: -int(part.sum())):
        if (content := part.tobytes()) not in drawn:  # else it is drawn twice
            drawn.add(content)
            whole = whole & ~part if (whole | ~part).all() else whole | part
    return whole
