"""Writes regions in the formats asked for, all of them or none."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medsight.files import fill, write_json
from medsight.scans.scan import Scan
from medsight.text import printable
from medsight.version import __version__

from .coco import write_coco
from .dicom_seg import write_dicom_seg
from .dicom_source import check_is_dicom
from .extras import load
from .measures import measure
from .nifti import Overlap, check_nifti, write_nifti
from .regions import FoundRegion, check_regions, group_by_label
from .rtstruct import write_rtstruct


FORMATS = ("png", "coco", "nifti", "dicom-seg", "rtstruct")
MASK_FILE = "mask-{:02d}.png"
REGIONS_FILE = "regions.json"
DICOM_FORMATS = {"dicom-seg": write_dicom_seg, "rtstruct": write_rtstruct}
NEEDED = {"dicom-seg": "highdicom", "rtstruct": "pydicom"}


def check_formats(scan: Scan, formats: Sequence[str]) -> None:
    """Refuse, before any region is looked for, what the scan's kind and the installed packages rule out. What single
    DICOM headers lack shows when they are read, in writing.

    Raises:
        ValueError: an unknown format, a format that the scan cannot be written in, or a package that is missing.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"format {unknown[0]!r}: expected some of {', '.join(FORMATS)}")
    if "nifti" in formats:
        check_nifti(scan)
    for name in DICOM_FORMATS:
        if name in formats:
            load(NEEDED[name], name)
            check_is_dicom(scan)


def write_masks(
    scan: Scan, regions: Sequence[FoundRegion], folder: Path, formats: Sequence[str], deidentify: bool = False
) -> list[Path]:
    """Writes `regions` in each of `formats`, and `regions.json`, which lists them, their sizes and the labels.

    | format | files | what for |
    |---|---|---|
    | png | `mask-NN.png` a region | 0 and 255, as the slice is displayed |
    | coco | `coco-rle.json`, `coco-polygons.json` | displayed slices as COCO images |
    | nifti | `labels.nii.gz` | a label map on the source's voxels |
    | dicom-seg | `segmentation.dcm` | a segment a label, on the source's images |
    | rtstruct | `rtstruct.dcm` | a ROI a label, in the patient's coordinates |

    Where there is no region, the DICOM formats, which need one, are left out, and `regions.json` says so.

    Args:
        scan: what the regions were found in.
        regions: in the order of their numbers, counted from 1.
        folder: made if it is not there; may hold other files.
        formats: any of `FORMATS`.
        deidentify: leave out of DICOM objects who the patient is, see `dicom_source`, and of the other files the name
            of the scan's file, which is all that they may know of it.

    Returns:
        The files written.

    Raises:
        ValueError: an unknown format, a format that the scan cannot be written in, a region that does not fit the
            scan, or a package that is missing.
        FileExistsError: a file is there already, or the folder is a file. Nothing is written then.
    """
    check_formats(scan, formats)
    check_regions(scan, regions)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output {folder} is a file; name a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as stage:
        _write(scan, regions, Path(stage), formats, deidentify)
        names = sorted(path.name for path in Path(stage).iterdir())
        folder.mkdir(exist_ok=True)
        fill(Path(stage), folder)
    return [folder / name for name in names]


def _write(scan: Scan, regions: Sequence[FoundRegion], stage: Path, formats: Sequence[str], deidentify: bool) -> None:
    overlaps: list[Overlap] | None = None
    left_out = {}
    if "png" in formats:
        for number, region in enumerate(regions, 1):
            Image.fromarray(region.mask.astype(np.uint8) * 255).save(stage / MASK_FILE.format(number))
    if "coco" in formats:
        write_coco(scan, regions, stage, scan_name(scan, deidentify))
    if "nifti" in formats:
        _, overlaps = write_nifti(scan, regions, stage)
    for name, write in DICOM_FORMATS.items():
        if name not in formats:
            continue
        if any(region.mask.any() for region in regions):
            write(scan, regions, stage, deidentify)
        else:
            left_out[name] = "no region was found"
    content = describe_regions(scan, regions, deidentify)
    if "png" in formats:
        for number, region in enumerate(content["regions"], 1):
            region["mask"] = MASK_FILE.format(number)
    if overlaps is not None:
        content["overlaps"] = [overlap.to_dict() for overlap in overlaps]
    if left_out:
        content["left_out"] = left_out
    write_json(stage / REGIONS_FILE, content)


def describe_regions(scan: Scan, regions: Sequence[FoundRegion], deidentify: bool = False) -> dict[str, Any]:
    """The content of `regions.json` that does not depend on the formats: scan, labels and regions with their sizes."""
    measures = measure(scan, regions)
    return {
        "medsight_version": __version__,
        "scan": {"name": scan_name(scan, deidentify), **scan.facts()},
        "labels": [
            {
                "number": label.number,
                "name": label.name,
                "codes": label.codes,
                "slices": sorted(label.masks),
                "volume_ml": measures.volume_ml[label.name],
            }
            for label in group_by_label(regions)
        ],
        "regions": [
            {
                "number": number,
                "slice": region.slice_index,
                "label": region.label,
                "code": region.code,
                "score": region.score,
                "area_px": int(region.mask.sum()),
                "area_mm2": area,
            }
            for number, (region, area) in enumerate(zip(regions, measures.area_mm2, strict=True), 1)
        ],
    }


def scan_name(scan: Scan, deidentify: bool) -> str:
    """How files written here call the scan: its file name without folders, printable; de-identified, its kind."""
    return scan.kind if deidentify else printable(Path(scan.name).resolve().name)
