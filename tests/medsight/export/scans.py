"""Scans with a known content, and readers of masks that share nothing with the writers."""

from pathlib import Path
from typing import Any

import numpy as np

from medsight.export import FoundRegion
from medsight.scans import Scan
from tests.medsight.scans.scan_files import dicom_bytes, dicom_dataset, functional_group


BRIGHT = 1000  # of tissue at 0: any sensible window tells them apart
WINDOW = (BRIGHT / 2, BRIGHT)  # the middle of the displayed range is halfway between tissue and bright
SENTINEL = "Zyzzogeton"  # stands wherever a file can say who the patient is
SECRET_DATE = "19031107"

# An orthonormal frame that no axis of the patient is parallel to.
OBLIQUE = np.linalg.qr(np.array([[0.9, -0.3, 0.2], [0.2, 0.8, -0.4], [0.1, 0.5, 0.95]]))[0]


def bright_volume(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Boolean (slices, rows, columns): a box off the centre with a hole, a bar, a single pixel; one slice is empty."""
    rng = np.random.default_rng(seed)
    slices, rows, columns = shape
    bright = np.zeros(shape, dtype=bool)
    for index in range(1, slices):
        top, left = rng.integers(1, rows // 3), rng.integers(1, columns // 3)
        bright[index, top : top + rows // 2, left : left + columns // 2] = True
        bright[index, top + 2 : top + rows // 4, left + 3 : left + columns // 4] = False
        bright[index, -1, : columns // 2] = True
        bright[index, 0, -1] = True
    return bright


def bright_regions(scan: Scan, level: float = BRIGHT / 2, label: str = "bright", every: int = 1) -> list[FoundRegion]:
    """A region for each slice, or for some, where what is displayed lies above `level`."""
    regions = []
    for index in range(0, scan.num_slices, every):
        window = None if scan.kind == "image" else (level, 2.0)
        shown = np.asarray(scan.slice_image(index, window).convert("L"))
        regions.append(FoundRegion(index, scan.to_grid(shown > 127), label, f"[C0_{index % 16}]", 0.5))
    return regions


def write_dicom_series(folder: Path, bright: np.ndarray, **changes: Any) -> list[Path]:
    """A CT series, oblique, its files named and numbered in no order; `bright` is (slices, rows, columns)."""
    from pydicom.uid import generate_uid

    folder.mkdir(parents=True)
    across, down, through = OBLIQUE.T
    if np.dot(np.cross(across, down), through) < 0:
        through = -through
    elements: dict[str, Any] = {
        **{f"{name}InstanceUID": generate_uid() for name in ("Study", "Series")},
        **{"FrameOfReferenceUID": generate_uid(), "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]},
        **{"PatientName": f"{SENTINEL}^Anna", "PatientID": f"{SENTINEL}-17", "PatientBirthDate": SECRET_DATE},
        **{"PatientSex": "F", "PatientAge": "077Y", "StudyTime": "101112", "StudyID": f"{SENTINEL}-S"},
        **dict.fromkeys(("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"), SECRET_DATE),
        **{"AccessionNumber": f"{SENTINEL}-A", "ReferringPhysicianName": f"{SENTINEL}^Doctor"},
        **dict.fromkeys(("StudyDescription", "SeriesDescription", "PatientComments"), f"{SENTINEL} thorax"),
        **{"InstitutionName": f"{SENTINEL} Clinic", "RescaleType": "HU"},
        **{"PixelSpacing": [0.75, 0.5], "SliceThickness": 2.5},
        "ImageOrientationPatient": [f"{value:.10f}" for value in (*across, *down)],
    }
    order = np.random.default_rng(1).permutation(len(bright))
    files = []
    for index, pixels in enumerate(bright):
        place = [f"{value:.8f}" for value in np.array([-40, 25, 100]) + 2.5 * index * through]
        numbered = {"InstanceNumber": int(order[index]) + 1, "ImagePositionPatient": place}
        dataset = dicom_dataset(pixels.astype(np.int16) * BRIGHT, **(elements | numbered | changes))
        dataset.add_new(0x00091001, "LO", f"{SENTINEL} private")
        files.append(folder / f"{order[index]:03d}.dcm")
        files[-1].write_bytes(dicom_bytes(dataset))
    return files


def write_multi_frame(path: Path, bright: np.ndarray) -> None:
    """An enhanced CT object whose frames are stored from last to first; `bright` is (slices, rows, columns)."""
    import pydicom

    single = [pydicom.dcmread(file) for file in reversed(write_dicom_series(path.with_suffix(""), bright))]
    dataset = single[0]
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.EnhancedCTImageStorage
    measures = {name: dataset[name].value for name in ("PixelSpacing", "SliceThickness")}
    shared = functional_group("PixelMeasuresSequence", **measures)
    orientation = dataset.ImageOrientationPatient
    shared.update(functional_group("PlaneOrientationSequence", ImageOrientationPatient=orientation))
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.PerFrameFunctionalGroupsSequence = [
        functional_group("PlanePositionSequence", ImagePositionPatient=frame.ImagePositionPatient) for frame in single
    ]
    dataset.NumberOfFrames = len(single)
    dataset.PixelData = b"".join(frame.PixelData for frame in single)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        del dataset[keyword]
    dataset.save_as(path, enforce_file_format=True)


def write_nifti_volume(path: Path, bright: np.ndarray, qform_code: int = 1, sform_code: int = 2) -> np.ndarray:
    """A NIfTI whose voxel array is `bright` as it is, with an oblique affine; returns that affine."""
    import nibabel

    affine = np.eye(4)
    affine[:3, :3] = OBLIQUE @ np.diag([0.7, 1.1, -3.0])
    affine[:3, 3] = 12, -34, 56
    image = nibabel.Nifti1Image(bright.astype(np.int16) * BRIGHT, affine)
    image.set_qform(affine, qform_code)
    image.set_sform(affine, sform_code)
    image.header["descrip"] = image.header["aux_file"] = image.header["db_name"] = SENTINEL.encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", f"{SENTINEL}^Anna".encode()))
    nibabel.save(image, path)
    return affine


def fill(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Pixels whose centre lies inside by the even-odd rule; (0, 0) is the corner of the image, as in COCO."""
    inside = np.zeros((height, width), dtype=bool)
    x = np.arange(width) + 0.5
    for polygon in polygons:
        for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            for row in range(max(0, int(min(y0, y1)) - 1), min(height, int(max(y0, y1)) + 2)):
                if (y0 <= row + 0.5) != (y1 <= row + 0.5):
                    inside[row] ^= x < x0 + (row + 0.5 - y0) / (y1 - y0) * (x1 - x0)
    return inside
