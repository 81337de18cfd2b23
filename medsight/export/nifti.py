"""Regions as a NIfTI label map on the source's own voxels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsight.scans.scan import Scan

from .regions import FoundRegion, Label, group_by_label


NIFTI_FILE = "labels.nii.gz"
GEOMETRY_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)


def check_nifti(scan: Scan) -> None:
    """Raises a ValueError if the scan has no voxel grid, so that `write_nifti` can write no regions of it."""
    if scan.affine is None and scan.kind != "nifti":
        others = "png, coco or dicom-seg" if scan.kind == "dicom" else "png or coco"
        raise ValueError(
            f"{scan.name}: nifti needs an evenly spaced voxel grid with a place in the patient, and it states none; "
            f"use {others}"
        )


def write_nifti(scan: Scan, regions: Sequence[FoundRegion], folder: Path) -> list[dict[str, Any]]:
    """Writes `labels.nii.gz`: 0 is background, n the label numbered n in `regions.json`.

    Shape, orientation and units are the source's; nothing else of its header is taken over. The names are in the file
    too, as a comment extension (JSON). A voxel holds one label: where labels overlap, the smaller one (by voxels in
    the whole scan; the later found of equals) is kept, so that a lesion stays visible inside its organ.

    Returns:
        The overlaps that were decided so: the names of two labels, their common voxels, and the name that is kept.
    """
    from nibabel.nifti1 import Nifti1Extension

    labels = group_by_label(regions)
    volume, overlaps = _label_map(scan, labels)
    image = _image_like(scan, volume) if scan.kind == "nifti" else _image_of_dicom(scan, volume)
    names = {0: "background"} | {label.number: label.name for label in labels}
    image.header.extensions.append(Nifti1Extension("comment", json.dumps(names).encode()))
    image.to_filename(folder / NIFTI_FILE)
    return overlaps


def _label_map(scan: Scan, labels: Sequence[Label]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Label numbers on the source's grid, and the overlaps; see `write_nifti` for who wins."""
    largest_first = sorted(labels, key=lambda label: (-sum(int(m.sum()) for m in label.masks.values()), label.number))
    volume = scan.to_source({}).astype(np.uint8 if len(labels) < 256 else np.uint16)
    overlaps = []
    for position, label in enumerate(largest_first):
        for below in largest_first[:position]:
            slices = label.masks.keys() & below.masks.keys()
            if voxels := sum(int((label.masks[i] & below.masks[i]).sum()) for i in slices):
                overlaps.append({"labels": [below.name, label.name], "voxels": voxels, "kept": label.name})
        volume[scan.to_source(label.masks)] = label.number
    return volume, overlaps


def _image_like(scan: Scan, volume: np.ndarray) -> Any:
    """An image of `volume` with both of the source's transforms, bit by bit: viewers differ in which they use."""
    import nibabel

    source = scan.nifti_header
    is_second = isinstance(source, nibabel.Nifti2Header)
    image = (nibabel.Nifti2Image if is_second else nibabel.Nifti1Image)(volume, scan.affine)
    for field in GEOMETRY_FIELDS:
        image.header[field] = source[field]
    image.header["pixdim"][:4] = source["pixdim"][:4]
    return image


def _image_of_dicom(scan: Scan, volume: np.ndarray) -> Any:
    """An image of (frames, rows, columns), its axes in NIfTI's usual order: columns, rows, frames."""
    import nibabel

    turned = np.asarray(scan.affine)[:, [2, 1, 0, 3]]
    image = nibabel.Nifti1Image(volume.transpose(2, 1, 0), turned)
    image.set_sform(turned, code="scanner")
    image.set_qform(turned, code="scanner")
    if not np.allclose(image.get_qform(), turned, atol=1e-3):
        image.set_qform(None, code="unknown")  # a tilted gantry shears the grid, which a quaternion cannot say
    image.header.set_xyzt_units("mm")
    return image
