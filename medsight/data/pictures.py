"""Images and masks of training data, decoded wholly or refused with the name of their file."""

import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter

from medsight.scans.file_kinds import recognise
from processing_medsight.image_loading_medsight import (
    MAX_IMAGE_PIXELS,
    count_frames,
    load_image,
    load_samples,
    open_image,
    to_array,
)


# What a row holds for a picture, as `datasets.Image(decode=False)` yields it: {"path", "bytes"}.
PictureEntry = Mapping[str, Any]

_ORIENTATION = 0x0112  # of a picture, in EXIF
_SCANS = {"dicom": "DICOM file", "nifti": "NIfTI volume", "npy": "NumPy array"}
_ONE_STRUCTURE = (
    "A mask shows one structure: save each as a file of its own, such as `labels == 1`, and name it by _TARGET in the "
    "file's name, or by `target` in a manifest"
)


class NotAPictureError(ValueError):
    """A file is a scan or an array, where a picture was expected."""


class MaskSizeError(ValueError):
    """A mask is not of the size of its image."""


class EmptyMaskError(ValueError):
    """A mask has no pixel inside."""


class MaskValuesError(ValueError):
    """A mask shows more than one structure."""


def picture_name(entry: PictureEntry) -> str:
    """What an error calls a picture: its path, or where its bytes came from."""
    return entry.get("path") or "a picture without a name"


def encode_mask(mask: np.ndarray, name: str) -> dict[str, Any]:
    """What a row holds for a mask (height, width), 0 outside, that was made from a file: a PNG of one bit a pixel."""
    return encode_picture(Image.fromarray(np.asarray(mask) != 0), name)


def encode_picture(image: Image.Image, name: str) -> dict[str, Any]:
    """What a row holds for a picture that was made from a file, such as a slice of a volume: a PNG."""
    content = BytesIO()
    image.save(content, "PNG")
    return {"path": name, "bytes": content.getvalue()}


def read_picture(entry: PictureEntry) -> Image.Image:
    """Decode an image wholly, in its own mode (a 16-bit scan stays 16-bit), turned upright if EXIF says so.

    Args:
        entry: `{"path": ..., "bytes": ...}`, of which the bytes count where there are any.

    Raises:
        FileNotFoundError: there is no such file.
        NotAPictureError: it is a scan or an array.
        ValueError: it is empty, truncated, damaged or no image at all, has too many pixels, or holds NaN or infinity.
    """
    name = picture_name(entry)
    image = load_image(_source(entry, name), name)
    if image.mode == "F":
        to_array(image, name, convert_rgb=False, rescale=True)  # refuses NaN and infinity
    return image


def _source(entry: PictureEntry, name: str) -> Path | bytes:
    """The file or bytes of a picture; see `read_picture` for what is raised."""
    content = entry.get("bytes")
    if content is None and entry.get("path") is None:
        raise ValueError(f"{name}: expected the path or the bytes of a picture, got neither")
    if content is None and not os.path.exists(name):
        raise FileNotFoundError(f"{name}: no such image file")
    source = Path(name) if content is None else content
    kind = recognise(source, name)
    if kind != "image":
        raise NotAPictureError(
            f"{name} is a {_SCANS[kind]}, and rows of data are about pictures: save its slices as PNG files, an image "
            "by `medsight.open_scan(path).slice_image(i).save(file)`, a mask from the same slice of its own volume, "
            "and name these files in its place"
        )
    return source


def read_mask(entry: PictureEntry, size: tuple[int, int]) -> np.ndarray:
    """Decode a mask, as `decode_mask` says: (height, width), bool."""
    return decode_mask(entry, size)[0]


def decode_mask(entry: PictureEntry, size: tuple[int, int]) -> tuple[np.ndarray, bool]:
    """Decode a mask of one structure: of the two values that are stored, 0 (black, where it has colours) is outside.

    Where lossy compression or smoothing has blurred the two, what is above the middle of their range is inside. A TIFF
    counts as stored also where it says that its 0 is white, as those of tifffile and ImageJ do, unless it is a fax.

    Args:
        entry: as for `read_picture`.
        size: (width, height) of its image in pixels, as `PIL.Image.Image.size` is.

    Returns:
        (height, width), bool, with at least one pixel inside; and whether the mask was blurred.

    Raises:
        FileNotFoundError: there is no such file.
        MaskSizeError, EmptyMaskError, MaskValuesError: the mask is of another size than its image, has no pixel
            inside, or shows more than one structure: more values than two, or more pages than one.
        ValueError: as `read_picture`.
    """
    name = picture_name(entry)
    pixels = stored_samples(entry, name)
    height, width = pixels.shape[:2]
    if (width, height) != tuple(size):
        raise MaskSizeError(
            f"{name}: the mask is {width}x{height} pixels (width x height), its image {size[0]}x{size[1]}"
        )
    values = pixels if pixels.ndim == 2 else pixels.astype(np.int64) @ [1 << 32, 1 << 16, 1]
    if not values.any():
        raise EmptyMaskError(f"{name}: the mask is empty; a structure that is not in the image has no mask")
    if ((values == 0) | (values == values.max())).all():
        return values != 0, False
    inside = _deblurred(pixels, values)
    if inside is None:
        found, counts = np.unique(values, return_counts=True)
        most = sorted(found[np.argsort(-counts, kind="stable")[:8]].tolist())
        shown = most if pixels.ndim == 2 else [(value >> 32, value >> 16 & 65535, value & 65535) for value in most]
        raise MaskValuesError(
            f"{name}: expected a mask of two values, 0 outside its structure and another inside, got {len(found):,}: "
            f"{', '.join(map(str, shown))}{', …' if len(found) > len(most) else ''}. {_ONE_STRUCTURE}"
        )
    return inside, True


def picture_size(entry: PictureEntry) -> tuple[int, int]:
    """(width, height) of a picture, upright, by its header; raises as `read_picture`."""
    name = picture_name(entry)
    with open_image(_source(entry, name), name) as opened:
        width, height = opened.width, opened.height
        try:
            turned = isinstance(opened, Image.Image) and opened.getexif().get(_ORIENTATION, 1) >= 5
        except Exception as error:  # of a damaged header Pillow raises what it happens to meet
            raise ValueError(f"{name} is damaged or truncated: its EXIF header cannot be read ({error})") from error
    if not 0 < width * height <= MAX_IMAGE_PIXELS:
        raise ValueError(f"{name}: {width}x{height} pixels; 1 to {MAX_IMAGE_PIXELS:,} are read")
    return (height, width) if turned else (width, height)


def stored_samples(entry: PictureEntry, name: str, indices: bool = False) -> np.ndarray:
    """(height, width) greys or (height, width, 3) colours of a mask's file as they are stored, upright.

    Args:
        indices: of a picture with a palette give the indices, not the colours.
    """
    source = _source(entry, name)
    with open_image(source, name) as opened:
        pages = 1 if opened.format == "MPO" else count_frames(opened, name)
        fax = getattr(opened, "tag_v2", {}).get(259) in (2, 3, 4)  # says that its 0 is white, and means what it shows
    if pages > 1:
        raise MaskValuesError(f"{name}: expected one picture, got {pages} pages. {_ONE_STRUCTURE}")
    samples = load_samples(source, name, stored=not fax)
    if isinstance(samples, Image.Image):
        grey = samples.mode in ("1", "L", "I", "F", *("P" if indices else ())) or samples.mode.startswith("I;16")
        samples = np.asarray(samples) if grey else to_array(samples, name, convert_rgb=True, rescale=True)
    elif samples.shape[2] in (2, 4):  # what is transparent is black
        samples = samples[:, :, :-1] * (samples[:, :, -1:] > 0)
    if samples.dtype.kind == "f" and not np.isfinite(samples).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return samples[:, :, 0] if samples.ndim == 3 and (samples == samples[:, :, :1]).all() else samples


def _deblurred(pixels: np.ndarray, values: np.ndarray) -> np.ndarray | None:
    """What is inside in a mask whose two values were blurred; None for any other picture.

    Blur leaves many values, and those in between lie along edges. Labels are few, or small numbers, or fill areas.

    Args:
        pixels: (height, width) or (height, width, 3).
        values: (height, width), a number for each grey or colour.
    """
    found, grey = np.unique(values), pixels if pixels.ndim == 2 else pixels.max(axis=2)
    top = float(grey.max())
    if len(found) <= 3 or (top < 64 and np.array_equal(found, found.round())):
        return None
    if len(found) <= 8 and len(np.unique(values[_is_flat(values, 5)])) > 2:
        return None
    inside = grey > top / 2
    between = (grey > top / 4) & (grey < 3 * top / 4)
    for channel in np.moveaxis(pixels, 2, 0) if pixels.ndim == 3 else ():
        if channel.max() > top / 2:  # another colour is another structure
            between |= (channel > top / 2) != inside
    if np.count_nonzero(between & _is_flat(values, 2)) > 0.2 * np.count_nonzero(between):
        return None
    along_edges = maximum_filter(inside, 9) & ~minimum_filter(inside, 9)
    return inside if np.mean(between & ~along_edges) < 0.1 else None


def _is_flat(values: np.ndarray, side: int) -> np.ndarray:
    """Where a square of so many pixels a side around, or for an even side before, a pixel has one value."""
    return maximum_filter(values, side) == minimum_filter(values, side)
