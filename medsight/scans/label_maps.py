"""Label maps: a whole number a voxel or pixel, on the grid of the scan that they are of."""

import contextlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from processing_medsight.image_loading_medsight import decode, load_samples

from .file_kinds import recognise
from .nifti import NiftiScan
from .scan import Scan
from .stack import tiff_pages


MOST_LABELS = 2**16
_PHOTOMETRIC = 262  # tag of a TIFF
_SHIFT = 0.1  # voxels by which two grids may differ that are the same
_ROUNDING = 1e-3  # of numbers that are stored as floats
_CARET = re.compile(rb'<Label\s[^>]*?Key="(\d{1,5})"[^>]*>(?:<!\[CDATA\[)?([^<\]]+)')


def read_label_map(path: Path, name: str, scan: Scan) -> np.ndarray:
    """The numbers of a label map on the grid of its scan, in the shape of `Scan.to_source`: NIfTI, PNG, TIFF, ...

    Args:
        name: what to call the file in an error.

    Returns:
        uint8, or uint16 where there are labels above 255.

    Raises:
        ValueError: the file is missing or damaged, lies on another grid than the scan (both are named), or holds
            anything but whole numbers from 0 to 65535.
    """
    if not path.is_file():
        raise ValueError(f"{name}: there is no such file")
    is_volume = recognise(path, name) == "nifti"
    if is_volume != (scan.kind == "nifti"):
        raise ValueError(f"{name}: expected a label map of the kind of its image, {scan.name} ({scan.kind})")
    if isinstance(scan, NiftiScan):
        numbers = _of_nifti(path, name, scan)
    else:
        pages = tiff_pages(path, name)
        numbers = _numbers(load_samples(path, name), name) if pages is None else _of_pages(pages, name, scan)
        size = (scan.height, scan.width) if scan.num_slices == 1 else (scan.num_slices, scan.height, scan.width)
        if numbers.shape != size:
            raise ValueError(f"{name} is of {_times(numbers.shape)} pixels, its image {scan.name} of {_times(size)}")
    return _whole(numbers, name)


def label_names(path: Path, name: str) -> dict[int, str]:
    """What a NIfTI label map says that its labels are called: in the comment that `medsight.export` writes (JSON), or
    in a table of the Connectome Workbench's form, as of TotalSegmentator; {} where it does not say.

    Raises:
        ValueError: as `read_label_map`.
    """
    for content in NiftiScan(path, name, "axial", labels=True).extensions():
        names = {int(key): text.decode("utf-8", "replace").strip() for key, text in _CARET.findall(content)}
        if names := names or _of_json(content):
            return names
    return {}


def _of_json(content: bytes) -> dict[int, str]:
    try:
        names = json.loads(content.rstrip(b"\0"))
        return {int(key): text for key, text in names.items() if isinstance(text, str)}
    except (ValueError, AttributeError, RecursionError):
        return {}


def _of_nifti(path: Path, name: str, scan: NiftiScan) -> np.ndarray:
    labels = NiftiScan(path, name, "axial", labels=True)
    if not labels.is_wide:
        raise ValueError(f"{name} has voxels in colour: expected a number of a label each")
    check_grid(labels, scan)
    return labels.values()


def check_grid(other: NiftiScan, scan: NiftiScan) -> None:
    """Raises a ValueError, naming both, where a volume does not lie on the grid of a scan, voxel for voxel."""
    both = f"{other.name} and its image {scan.name} lie on two grids"
    if other.shape != scan.shape:
        raise ValueError(f"{both}: {_times(other.shape)} and {_times(scan.shape)} voxels; resample it to its image")
    if (other.affine is None) != (scan.affine is None):
        raise ValueError(f"{both}: {(other if other.affine is None else scan).name} has no usable affine")
    if other.affine is not None and scan.affine is not None:
        corners = np.array([(*corner, 1) for corner in itertools.product(*((0, size - 1) for size in scan.shape))])
        apart = np.abs(corners @ (np.linalg.solve(scan.affine, other.affine) - np.eye(4)).T).max()
        if apart > _SHIFT:
            raise ValueError(f"{both}: their affines lie up to {apart:.3g} voxels apart; resample it to its image")


def _of_pages(pages: Any, name: str, scan: Scan) -> np.ndarray:
    if pages.n_frames != scan.num_slices:
        raise ValueError(f"{name} has {pages.n_frames} pages, and its image {scan.name} {scan.num_slices}")
    if getattr(pages, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
        raise ValueError(f"{name} is a TIFF that says its 0 is white: save its labels as one whose 0 is black")
    with contextlib.closing(pages):
        return np.stack([_numbers(_page(pages, i, f"{name}, page {i}"), name) for i in range(pages.n_frames)])


def _page(pages: Any, index: int, name: str) -> np.ndarray:
    try:
        pages.seek(index)
    except Exception as error:
        raise ValueError(f"{name} is damaged or truncated ({error})") from error
    return np.asarray(decode(pages, name))


def _numbers(samples: Any, name: str) -> np.ndarray:
    """(height, width); of a palette the places in it, of three colours that are the same one of them."""
    numbers = np.asarray(samples)
    if numbers.ndim == 3 and numbers.shape[2] in (1, 3) and (numbers == numbers[:, :, :1]).all():
        numbers = numbers[:, :, 0]
    if numbers.ndim != 2:
        raise ValueError(f"{name} is in colour: expected the number of a label a pixel")
    return numbers


def _whole(numbers: np.ndarray, name: str) -> np.ndarray:
    if numbers.dtype == np.bool_:
        return numbers.astype(np.uint8)
    low, high = numbers.min(), numbers.max()
    if not (0 <= low <= high < MOST_LABELS):  # NaN is neither
        raise ValueError(f"{name}: expected labels from 0 to {MOST_LABELS - 1}, got {low:g} to {high:g}")
    kind = np.dtype(np.uint8 if high < 2**8 - 0.5 else np.uint16)
    if numbers.dtype.kind != "f":
        return numbers.astype(kind, copy=False)
    whole = np.rint(numbers).astype(kind)
    if (wrong := np.abs(numbers - whole) > _ROUNDING).any():
        raise ValueError(f"{name}: expected the whole number of a label a voxel, got {numbers[wrong][0]:g}")
    return whole


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
