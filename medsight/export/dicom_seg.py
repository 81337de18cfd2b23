"""Regions as a DICOM segmentation object."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsight.scans.dicom_file import guarded
from medsight.scans.dicom_header import position_of
from medsight.scans.scan import Scan
from medsight.version import __version__

from .dicom_source import source_headers
from .drawing import PALETTE
from .regions import FoundRegion, Label, group_by_label
from .terminology import segment_codes


SEG_FILE = "segmentation.dcm"
MANUFACTURER = "MedSIGHT"
SERIES_NUMBER = 1001
LONGEST_NAME = 64  # characters of a DICOM Long String


def check_dicom_seg(scan: Scan, slices: Sequence[int]) -> None:
    """Raises a ValueError where slices lie at one position, which a segmentation tells slices apart by."""
    headers = scan.dicom_datasets()
    is_series = len(headers) > 1
    with guarded(scan.name, "its DICOM header is damaged"):
        places = [position_of(headers[i], 0) if is_series else position_of(headers[0], i) for i in slices]
    known = [tuple(place) for place in places if place is not None]
    if len(set(known)) < len(known):
        ask = "ask about slices at different positions, or " if is_series else ""
        raise ValueError(
            f"{scan.name}: dicom-seg cannot refer to several slices at one position, as of a moving heart or several "
            f"echoes; {ask}use png, coco or rtstruct"
        )


def write_dicom_seg(scan: Scan, regions: Sequence[FoundRegion], folder: Path, deidentify: bool) -> None:
    """Writes `segmentation.dcm`: a binary segment a label, referring to the source's images; segments may overlap.

    Slices without a region are neither stored nor, in a series, referred to. Each segment carries codes of what its
    label names (see `terminology`), the colour of the overlay, the region codes, and MedSIGHT as its algorithm.

    Args:
        deidentify: see `dicom_source`.

    Raises:
        ValueError: the scan lacks what a segmentation must refer to.
    """
    import highdicom as hd
    from pydicom.uid import generate_uid

    headers = source_headers(scan, deidentify)
    labels = labels_with_pixels(regions)
    pixels = np.stack([scan.to_source(label.masks) for label in labels], axis=-1)
    frames = np.arange(len(pixels)) if len(headers) == 1 else np.flatnonzero(pixels.any(axis=(1, 2, 3)))
    if len(frames) > 1 and not headers[0].get("FrameOfReferenceUID"):
        raise ValueError(
            f"{scan.name}: dicom-seg of several slices needs a Frame of Reference UID, and its files have none; "
            "use png or coco, or write each slice by itself"
        )
    with guarded(scan.name, "dicom-seg cannot refer to it: its header lacks, or has damaged, what that needs"):
        segmentation = hd.seg.Segmentation(
            source_images=headers if len(headers) == 1 else [headers[frame] for frame in frames],
            pixel_array=pixels[frames],
            segmentation_type="BINARY",
            segment_descriptions=[_describe(label, number) for number, label in enumerate(labels, 1)],
            series_instance_uid=generate_uid(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer=MANUFACTURER,
            manufacturer_model_name=MANUFACTURER,
            software_versions=__version__,
            device_serial_number="none",
            content_label="MEDSIGHT",
            content_description="Regions cited in an answer of MedSIGHT",
            series_description="MedSIGHT segmentation",
            specific_character_set="ISO_IR 192",
        )
        segmentation.save_as(folder / SEG_FILE, enforce_file_format=True)


def labels_with_pixels(regions: Sequence[FoundRegion]) -> list[Label]:
    """The labels that have at least one pixel, without their empty slices."""
    return group_by_label([region for region in regions if region.mask.any()])


def long_string(text: str) -> str:
    """`text` as a DICOM Long String: at most 64 characters, and none that DICOM gives a meaning to."""
    clean = "".join(char if char.isprintable() and char != "\\" else " " for char in text)
    return clean if len(clean) <= LONGEST_NAME else clean[: LONGEST_NAME - 1] + "…"


def _describe(label: Label, number: int) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    found = segment_codes(label.name)
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=long_string(label.name),
        segmented_property_category=found.category,
        segmented_property_type=found.property_type,
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name="MedSIGHT", family=codes.DCM.ArtificialIntelligence, version=__version__
        ),
        display_color=hd.color.CIELabColor.from_rgb(*PALETTE[(label.number - 1) % len(PALETTE)]),
    )
    description.SegmentDescription = label.description
    if found.laterality is not None:
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [
            hd.sr.CodedConcept.from_code(found.laterality)
        ]
    return description
