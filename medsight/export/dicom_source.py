"""What the DICOM objects written here take over from the source: its headers, with or without the patient.

With `deidentify`, the headers are rebuilt from a list of what geometry and references need (`KEPT`); whatever is not
on the list, known or private, is not there to be copied. Every UID but those of the standard itself is replaced by
`replaced_uid`, which gives the same for the same: objects of one study stay together, and a source whose UIDs are
replaced in the same way still matches.
"""

from typing import TYPE_CHECKING

from medsight.scans.dicom_file import guarded
from medsight.scans.scan import Scan
from medsight.version import __version__


if TYPE_CHECKING:
    from pydicom import Dataset

PATIENT_AND_STUDY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
KEPT = frozenset(
    """
    SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID
    Modality ImageType NumberOfFrames Rows Columns LossyImageCompression
    ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness SpacingBetweenSlices
    SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence
    PixelMeasuresSequence PlanePositionSequence PlaneOrientationSequence
    TotalPixelMatrixColumns TotalPixelMatrixRows TotalPixelMatrixFocalPlanes TotalPixelMatrixOriginSequence
    ImageOrientationSlide PlanePositionSlideSequence DimensionOrganizationType
    NumberOfOpticalPaths OpticalPathSequence
    XOffsetInSlideCoordinateSystem YOffsetInSlideCoordinateSystem ZOffsetInSlideCoordinateSystem
    ColumnPositionInTotalImagePixelMatrix RowPositionInTotalImagePixelMatrix
    ImagedVolumeWidth ImagedVolumeHeight ImagedVolumeDepth
    """.split()
)
REFERENCES = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")


def source_headers(scan: Scan, deidentify: bool) -> list["Dataset"]:
    """The headers of the scan's DICOM files, in their order, ready to be referenced.

    Attributes of patient and study that DICOM demands, and the source lacks, are there, empty; so is a sex that DICOM
    does not know.

    Raises:
        ValueError: the scan lacks a UID by which to refer to it.
    """
    with guarded(scan.name, "its DICOM header is damaged"):
        headers = [_prepare(source, deidentify) for source in scan.dicom_datasets()]
    missing = [keyword for keyword in REFERENCES if any(not header.get(keyword) for header in headers)]
    if missing:
        raise ValueError(
            f"{scan.name}: dicom-seg and rtstruct refer to images by UIDs, and its files lack {', '.join(missing)}; "
            "use png or coco"
        )
    return headers


def _prepare(source: "Dataset", deidentify: bool) -> "Dataset":
    from pydicom import Dataset

    header = _geometry(source) if deidentify else Dataset(source)
    for keyword in PATIENT_AND_STUDY:
        if keyword not in header:
            setattr(header, keyword, "")
    if header.PatientSex not in ("M", "F", "O"):
        header.PatientSex = ""
    if deidentify:
        header.PatientIdentityRemoved = "YES"
        header.DeidentificationMethod = f"MedSIGHT {__version__}: only geometry kept, UIDs replaced"
    return header


def _geometry(source: "Dataset") -> "Dataset":
    """The part of a header, or of an item of one of its sequences, that is on the list, with UIDs replaced."""
    from pydicom import Dataset

    geometry = Dataset()
    for keyword in KEPT & set(source.dir()):
        value = source[keyword].value
        if source[keyword].VR == "SQ":
            value = [_geometry(item) for item in value]
        elif source[keyword].VR == "UI" and keyword != "SOPClassUID" and value:  # an empty one stays missing
            value = replaced_uid(value)
        setattr(geometry, keyword, value)
    return geometry


def replaced_uid(uid: str) -> str:
    """The UID that stands for `uid` in de-identified objects: a hash of it (SHA-512), the same in every run.

    Whoever already knows a UID can tell that it belongs to an object; nobody can compute it from the object.
    """
    from pydicom.uid import generate_uid

    return str(generate_uid(entropy_srcs=["medsight", str(uid)]))
