"""Opens whatever a caller names as a scan: its kind follows from its content, never from its name."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from PIL import Image

from processing_medsight.image_loading_medsight import as_numpy, display_name, find_file, load_array, load_image

from .dicom import DicomScan, series_files
from .file_kinds import recognise
from .nifti import NiftiScan
from .scan import Picture, Scan, orientation_of
from .stack import ArrayStack, PageStack, tiff_pages


class SupportsArray(Protocol):
    """An array, or what NumPy can make one of, such as a tensor."""

    def __array__(self) -> Any: ...


Source: TypeAlias = str | os.PathLike | bytes | Image.Image | np.ndarray | SupportsArray

_MOST_CHANNELS = 4


def open_scan(source: Source, name: str | None = None, plane: str | None = None, volume: bool = False) -> Scan:
    """Open what a caller names: one file, a folder that holds one DICOM series, its bytes, or an array.

    Args:
        source: path (also an http(s) address or base64, as [`load_image`]), bytes, a Pillow image, or an array or
            tensor. An array whose first or last of three axes has 1 to 4 entries is a picture, these its channels; any
            other one of three axes is a volume, its slices along the first; one whose last axis is not half as long as
            either of the others is refused, since that may hold channels or slices.
        name: what to call it, and files in it, in messages; the path by default.
        plane: along which a NIfTI volume is cut, "axial" (the default), "coronal" or "sagittal"; or an orientation,
            such as "AI", see `medsight.scans.scan.orientation_of`.
        volume: take the first axis of an array (also of a .npy file) for slices, however few or narrow. Where the last
            axis has 1 to 4 entries, these are channels all the same.

    Returns:
        The scan: its header was read and checked, its pixels are decoded when they are asked for.

    Raises:
        ValueError: for what is missing, damaged, too large or no image, or a plane of anything but NIfTI, saying which
            and what to do.
    """
    if plane is not None:
        orientation_of(plane)
    scan = _open(source, name, plane or "axial", volume)
    if plane is not None and scan.plane is None:
        raise ValueError(f"{scan.name}: plane={plane!r} is for NIfTI volumes; anything else is shown as it is stored")
    return scan


def _open(source: Source, name: str | None, plane: str, volume: bool) -> Scan:
    if isinstance(source, Image.Image):
        return Picture(source, name or getattr(source, "filename", None) or "image")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_file(bytes(source), name or "bytes", plane, volume)
    if isinstance(source, (str, os.PathLike)):
        name = name or display_name(source)
        if os.path.isdir(source):
            return DicomScan(series_files(Path(source), name), name)
        return _open_file(find_file(source, name), name, plane, volume)
    if hasattr(source, "__array__"):
        return _open_array(as_numpy(source, name or "array"), name or "array", [], volume)
    kind = type(source).__name__
    raise ValueError(f"{name or 'source'}: expected a path, bytes, an image, an array or a tensor, got {kind}")


def _open_file(source: Path | bytes, name: str, plane: str, volume: bool) -> Scan:
    files = [source] if isinstance(source, Path) else []
    kind = recognise(source, name)
    if kind == "dicom":
        return DicomScan([source], name)
    if kind == "nifti":
        return NiftiScan(source, name, plane)
    if kind == "npy":
        return _open_array(load_array(source, name), name, files, volume)
    pages = tiff_pages(source, name)
    return Picture(load_image(source, name), name, files) if pages is None else PageStack(pages, name, files)


def _open_array(array: np.ndarray, name: str, files: Sequence[Path], volume: bool) -> Scan:
    """A volume has three axes, no channels along the last one, and along the first only if `volume` says slices."""
    least = 1 if volume else _MOST_CHANNELS + 1
    is_volume = array.ndim == 3 and array.shape[0] >= least and array.shape[2] > _MOST_CHANNELS
    if is_volume and not volume:
        columns = array.shape[2]
        if 2 * columns < min(array.shape[:2]):
            raise ValueError(
                f"{name}: an array of shape {array.shape} seems to have {columns} channels, or slices along its last "
                "axis. Give 1 to 4 channels, or slices along the first axis: np.moveaxis(array, -1, 0). If its slices "
                "do lie along the first, open it by open_scan(array, volume=True)"
            )
    return ArrayStack(array, name, files) if is_volume else Picture(array, name, files)
