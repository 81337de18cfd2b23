"""Regions as a DICOM RT structure set."""

import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medsight.scans.dicom_file import guarded
from medsight.scans.scan import Scan
from medsight.version import __version__

from .dicom_seg import MANUFACTURER, labels_with_pixels, long_string
from .dicom_source import PATIENT_AND_STUDY, source_headers
from .drawing import PALETTE
from .outlines import outlines
from .regions import FoundRegion, Label
from .terminology import segment_codes


if TYPE_CHECKING:
    from pydicom import Dataset

RTSTRUCT_FILE = "rtstruct.dcm"
SERIES_NUMBER = 1002


def write_rtstruct(scan: Scan, regions: Sequence[FoundRegion], folder: Path, deidentify: bool) -> None:
    """Writes `rtstruct.dcm`: a ROI a label, a closed planar contour a connected part of it on a slice.

    Contours run through the middles of pixel edges, so that the centres of exactly the mask's pixels lie inside; holes
    are joined to the outline around them (see `outlines`).

    Raises:
        ValueError: the scan does not say where in the patient its slices lie.
    """
    import pydicom

    headers = source_headers(scan, deidentify)
    for header in headers:
        if not header.get("FrameOfReferenceUID") or header.get("ImageOrientationSlide") is not None:
            raise ValueError(
                f"{scan.name}: rtstruct needs to know where in the patient each slice lies (Frame of Reference UID, "
                "Image Position (Patient)), and its files do not say; use dicom-seg, png or coco"
            )
    with guarded(scan.name, "its DICOM header is damaged"):
        structures = _structure_set(headers)
    for label in labels_with_pixels(regions):
        volume = scan.to_source(label.masks)
        frames = np.flatnonzero(volume.any(axis=(1, 2))).tolist()
        contours = [contour for i in frames for contour in _contours(scan, headers, i, volume[i])]
        _add_roi(structures, label, contours)
    # Implicit: in explicit syntaxes a contour of some thousand points outgrows the 64 KiB of its element.
    structures.file_meta = pydicom.dataset.FileMetaDataset()
    structures.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    with guarded(scan.name, "its header has what cannot be written to an RTSTRUCT"):
        structures.save_as(folder / RTSTRUCT_FILE, enforce_file_format=True)


def _contours(scan: Scan, headers: Sequence["Dataset"], frame: int, mask: np.ndarray) -> Iterator["Dataset"]:
    from highdicom.spatial import ImageToReferenceTransformer

    header = headers[frame] if len(headers) > 1 else headers[0]
    is_frame = "NumberOfFrames" in header and "PerFrameFunctionalGroupsSequence" in header
    frame_number = frame + 1 if is_frame and len(headers) == 1 else None
    with guarded(f"{scan.name}, frame {frame + 1}", "its header does not say where in the patient it lies"):
        place = ImageToReferenceTransformer.for_image(header, frame_number)
    for polygon in outlines(mask):
        yield _item(
            ContourImageSequence=[_reference(header, frame_number)],
            ContourGeometricType="CLOSED_PLANAR",
            NumberOfContourPoints=len(polygon),
            # Ten digits fit a decimal string and place a point of a body to better than a micrometre.
            ContourData=[f"{value:.10g}" for value in place(polygon.astype(np.float64)).ravel()],
        )


def _structure_set(headers: Sequence["Dataset"]) -> "Dataset":
    """A structure set that refers to all images and has no ROI."""
    from pydicom.uid import RTStructureSetStorage, generate_uid

    first, now = headers[0], datetime.datetime.now()
    date, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    series = _item(
        SeriesInstanceUID=first.SeriesInstanceUID, ContourImageSequence=[_reference(header) for header in headers]
    )
    study = _item(
        # Detached Study Management, retired, which this reference still names by definition.
        ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",
        ReferencedSOPInstanceUID=first.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    structures = _item(
        SpecificCharacterSet="ISO_IR 192",
        SOPClassUID=RTStructureSetStorage,
        SOPInstanceUID=generate_uid(),
        InstanceCreationDate=date,
        InstanceCreationTime=time,
        StudyInstanceUID=first.StudyInstanceUID,
        SeriesInstanceUID=generate_uid(),
        SeriesNumber=SERIES_NUMBER,
        SeriesDescription="MedSIGHT structure set",
        Modality="RTSTRUCT",
        OperatorsName="",
        Manufacturer=MANUFACTURER,
        ManufacturerModelName=MANUFACTURER,
        SoftwareVersions=__version__,
        InstanceNumber=1,
        FrameOfReferenceUID=first.FrameOfReferenceUID,
        PositionReferenceIndicator="",
        StructureSetLabel="MedSIGHT",
        StructureSetDate=date,
        StructureSetTime=time,
        ApprovalStatus="UNAPPROVED",
        ReferencedFrameOfReferenceSequence=[
            _item(FrameOfReferenceUID=first.FrameOfReferenceUID, RTReferencedStudySequence=[study])
        ],
        StructureSetROISequence=[],
        ROIContourSequence=[],
        RTROIObservationsSequence=[],
    )
    for keyword in (*PATIENT_AND_STUDY, "PatientIdentityRemoved", "DeidentificationMethod"):
        if keyword in first:
            setattr(structures, keyword, first[keyword].value)
    return structures


def _add_roi(structures: "Dataset", label: Label, contours: list["Dataset"]) -> None:
    number = len(structures.StructureSetROISequence) + 1
    kind = segment_codes(label.name).property_type
    code = _item(CodeValue=kind.value, CodingSchemeDesignator=kind.scheme_designator, CodeMeaning=kind.meaning)
    structures.StructureSetROISequence.append(
        _item(
            ROINumber=number,
            ReferencedFrameOfReferenceUID=structures.FrameOfReferenceUID,
            ROIName=long_string(label.name),
            ROIDescription=label.description,
            ROIGenerationAlgorithm="AUTOMATIC",
            ROIGenerationDescription=f"MedSIGHT {__version__}",
        )
    )
    structures.ROIContourSequence.append(
        _item(
            ROIDisplayColor=list(PALETTE[(label.number - 1) % len(PALETTE)]),
            ContourSequence=contours,
            ReferencedROINumber=number,
        )
    )
    structures.RTROIObservationsSequence.append(
        _item(
            ObservationNumber=number,
            ReferencedROINumber=number,
            RTROIInterpretedType="",
            ROIInterpreter="",
            RTROIIdentificationCodeSequence=[code],
        )
    )


def _reference(header: "Dataset", frame_number: int | None = None) -> "Dataset":
    frame = {} if frame_number is None else {"ReferencedFrameNumber": frame_number}
    uids = {"ReferencedSOPClassUID": header.SOPClassUID, "ReferencedSOPInstanceUID": header.SOPInstanceUID}
    return _item(**uids, **frame)


def _item(**attributes: Any) -> "Dataset":
    from pydicom import Dataset

    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return item
