"""Writes regions in the formats asked for, all of them or none."""

import importlib.util
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medsight.files import fill, write_json
from medsight.scans.scan import Scan
from medsight.text import printable
from medsight.version import __version__

from .coco import write_coco
from .dicom_seg import check_dicom_seg, write_dicom_seg
from .nifti import check_nifti, write_nifti
from .regions import FoundRegion, check_regions, group_by_label, measure
from .rtstruct import write_rtstruct


NEEDED = {  # packages, by format
    "png": (),
    "coco": ("pycocotools", "contourpy"),
    "nifti": ("nibabel",),
    "dicom-seg": ("highdicom",),
    "rtstruct": ("highdicom", "contourpy"),
}
FORMATS = tuple(NEEDED)
MASK_FILE = "mask-{:02d}.png"
REGIONS_FILE = "regions.json"
DICOM_FORMATS = {"dicom-seg": write_dicom_seg, "rtstruct": write_rtstruct}


def check_formats(scan: Scan, formats: Sequence[str], slices: Collection[int] | None = None) -> None:
    """Refuse, before any region is looked for, what the scan's kind and the installed packages rule out. What single
    DICOM headers lack shows when they are read, in writing.

    Args:
        slices: those that are asked about; all by default.

    Raises:
        ValueError: an unknown format, a format that the scan cannot be written in, or a package that is missing.
    """
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"format {name!r}: expected some of {', '.join(FORMATS)}")
        for package in NEEDED[name]:
            if importlib.util.find_spec(package) is None:
                raise ValueError(f'{name}: {package} is missing; install it: pip install "medsight[medical]"')
        if name == "nifti":
            check_nifti(scan)
        if name in DICOM_FORMATS and scan.kind != "dicom":
            raise ValueError(f"{scan.name} is not DICOM, whose images {name} refers to; use png or coco")
        if name == "dicom-seg":
            of_a_series = slices is not None and len(scan.dicom_datasets()) > 1
            check_dicom_seg(scan, sorted(set(slices or ())) if of_a_series else range(scan.num_slices))


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
    check_regions(scan, regions)
    check_formats(scan, formats, {region.slice_index for region in regions if region.mask.any()})
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
    # What files written here call the scan: its file name without folders, printable; de-identified, its kind.
    scan_name = scan.kind if deidentify else printable(Path(scan.name).resolve().name)
    content = _describe(scan, regions, scan_name)
    if "png" in formats:
        for number, region in enumerate(regions, 1):
            content["regions"][number - 1]["mask"] = MASK_FILE.format(number)
            Image.fromarray(region.mask.astype(np.uint8) * 255).save(stage / MASK_FILE.format(number))
    if "coco" in formats:
        write_coco(scan, regions, stage, scan_name)
    if "nifti" in formats:
        content["overlaps"] = write_nifti(scan, regions, stage)
    asked = [name for name in DICOM_FORMATS if name in formats]
    if any(region.mask.any() for region in regions):
        for name in asked:
            DICOM_FORMATS[name](scan, regions, stage, deidentify)
    elif asked:
        content["left_out"] = dict.fromkeys(asked, "no region was found")
    write_json(stage / REGIONS_FILE, content)


def _describe(scan: Scan, regions: Sequence[FoundRegion], scan_name: str) -> dict[str, Any]:
    """The content of `regions.json` that does not depend on the formats: scan, labels and regions with their sizes."""
    measures = measure(scan, regions)
    return {
        "medsight_version": __version__,
        "scan": {"name": scan_name, **scan.facts()},
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
