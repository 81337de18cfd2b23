"""From whatever a caller names an image by to an array of 8-bit pixels, or to an error that names the culprit.

Ranges. 8-bit pixels stay as they are. Other integers (16-bit scans) and floats are 8-bit values where they lie in
[0, 255]; floats that all lie in [0, 1] are multiplied by 255; any other range is stretched linearly, its smallest
value to 0 and its largest to 255, over all colour channels together. So a 16-bit scan is neither clipped nor nearly
black, whatever part of the 65,536 levels it uses; a caller who wants a window sets it before. Colours of a file are
brought to 8 bits so when they are read, since Pillow has none of more.

Pictures only: files of scanners (DICOM, NIfTI) are recognised to say what opens them, `medsight.open_scan`.
"""

import base64
import contextlib
import math
import os
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import Image, ImageFile, ImageOps
from transformers.utils import logging

from .deep_images_medsight import DeepTiff, deep_colours, jpeg_2000_bits, pillow_reads, white_is_zero


logger = logging.get_logger(__name__)

OPEN_SCAN = (
    "A scan is handed over slice by slice: `from medsight import open_scan`, then `open_scan(path).slice_image(i)`"
)
# Below Pillow's own limit for files (178,956,970), so that one rule holds for files, lazily opened images and arrays.
MAX_IMAGE_PIXELS = 2**27
MAX_DOWNLOAD = 2**30  # bytes behind an address
_CHANNELS = (1, 2, 3, 4)
HEAD_BYTES = 1024  # by which a file is recognised
GZIP_MAGIC, _NPY_MAGIC = b"\x1f\x8b", b"\x93NUMPY"
_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LONGEST_NAME = 120  # characters of a base64 string that a message shows
_SHORTEST_BASE64 = 64  # no image is smaller; a shorter string is a file that is not there
_PHOTOMETRIC, _BITS, _ORIENTATION = 262, 258, 274  # tags of a TIFF; the last of EXIF too
_SCAN_FORMATS = ("DICOM", "NIfTI", "gzip")
# Not whatever Pillow can open: some of its readers start other programs.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")


def load_image(source: str | os.PathLike | bytes, name: str | None = None) -> Image.Image:
    """Read a picture, completely, in its own mode (a 16-bit scan stays 16-bit), turned upright if EXIF says so.

    Args:
        source: path of a file, an http(s) address, a base64 string (`data:image/...` or bare), or a file's bytes.
        name: what to call it in an error; the path by default.

    Returns:
        The decoded image; its first frame where there are several (a warning says so).

    Raises:
        ValueError: if it is missing, unreadable, empty or truncated, a scan, a folder, has no pixels, or has more than
            `MAX_IMAGE_PIXELS` (checked before any pixel is decoded).
    """
    image: Image.Image = load_samples(source, name, stored=False)
    return image


def load_samples(source: str | os.PathLike | bytes, name: str | None = None, stored: bool = True) -> Any:
    """What `load_image` reads, with the numbers that the file has: those of masks and label maps mean something.

    Args:
        stored: `False` gives what `load_image` does.

    Returns:
        A Pillow image, or an array (height, width, channels) of what Pillow cannot hold. A TIFF whose 0 is white is
        not inverted.
    """
    name = name or display_name(source)
    found = find_file(source, name)
    kind = format_of(head_of(found, name))
    if kind in _SCAN_FORMATS:
        raise ValueError(f"{name} is a {kind} file, not a picture. {OPEN_SCAN}")
    with open_image(found, name) as opened:
        frames = count_frames(opened, name)
        if frames > 1 and opened.format != "MPO":
            logger.warning(f"{name} holds {frames} frames: only the first is used")
        image = _decoded(opened, name, stored)
    if isinstance(image, np.ndarray):
        if stored:
            return image
        image = _picture_of(image, name)
    image.format = opened.format
    image.filename = os.fspath(found) if isinstance(found, Path) else ""  # type: ignore[attr-defined]
    return image


def load_picture(source: str | os.PathLike | bytes, name: str | None = None) -> Image.Image | np.ndarray:
    """What `load_image` reads, or the array of a .npy file."""
    name = name or display_name(source)
    found = find_file(source, name)
    return load_array(found, name) if format_of(head_of(found, name)) == "npy" else load_image(found, name)


def find_file(source: str | os.PathLike | bytes, name: str) -> Path | bytes:
    """The path of a file that exists, or the bytes that are given, or stand behind an address or in a base64 string.

    A ValueError says that there is no such file, that it is a folder, or that the address gives none.
    """
    if isinstance(source, bytes):
        return source
    if os.path.isdir(source):
        raise ValueError(f"{name} is a folder: an image file was expected. {OPEN_SCAN}")
    if os.path.isfile(source):
        return Path(source)
    text = os.fspath(source)
    if text.startswith(("http://", "https://")):
        return _download(text, name)
    if text.startswith("data:") or len(text) >= _SHORTEST_BASE64:
        content = text.partition(",")[2] if text.startswith("data:") else text
        with contextlib.suppress(ValueError):
            return base64.b64decode("".join(content.split()), validate=True)
    raise ValueError(f"{name}: there is no such file, and it is neither an http(s) address nor a base64 image")


def head_of(source: Path | bytes, name: str) -> bytes:
    """The first bytes of a file, by which it is recognised; a ValueError where it has none or cannot be read."""
    try:
        with open_source(source) as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror})") from error
    if not head:
        raise ValueError(f"{name} is empty (0 bytes): an image file was expected")
    return head


def open_source(source: Path | bytes) -> BinaryIO:
    """A file to read from, whether on a disk or in memory."""
    return BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def format_of(head: bytes) -> str | None:
    """A file's format, by its first bytes: "npy", or a scan's "DICOM", "NIfTI" or "gzip"; `None` for any other."""
    if head.startswith(GZIP_MAGIC):
        return "gzip"
    if head.startswith(_NPY_MAGIC):
        return "npy"
    return "DICOM" if _is_dicom(head) else "NIfTI" if _is_nifti(head) else None


def count_frames(opened: Image.Image | DeepTiff, name: str) -> int:
    """The number of frames or pages of an opened file; a ValueError where it is damaged."""
    try:
        return getattr(opened, "n_frames", 1)
    except Exception as error:
        raise ValueError(f"{name} is damaged or truncated: its frames cannot be counted ({error})") from error


def load_array(source: Path | bytes, name: str) -> np.ndarray:
    """The array of a .npy file, which is never unpickled; a view of the file where it is one.

    A ValueError says that its header is damaged, that it holds no numbers, or fewer than its header claims.
    """
    with open_source(source) as file:
        try:
            np.lib.format.read_magic(file)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:
            raise ValueError(f"{name} has a damaged .npy header, or one of an unknown version") from error
        start, end = file.tell(), file.seek(0, os.SEEK_END)
    if dtype.kind not in "biuf":
        raise ValueError(f"{name}: expected an array of numbers, got {dtype}")
    size = math.prod(shape) * dtype.itemsize
    if size != end - start:
        raise ValueError(f"{name}: its header claims {size:,} bytes of pixels, the file holds {end - start:,}")
    order: Literal["F", "C"] = "F" if fortran_order else "C"
    if isinstance(source, bytes):
        return np.frombuffer(source, dtype, offset=start).reshape(shape, order=order)
    return np.memmap(source, dtype, "r", start, shape, order)


def decode(image: Image.Image | DeepTiff, name: str) -> Image.Image:
    """A picture with its pixels decoded, after a look at its size, turned as its EXIF header says.

    Colours of more than 8 bits are brought to 8 by the range rule; a TIFF whose 0 is white is inverted.

    Args:
        image: opened by `open_image`, or a Pillow image from elsewhere, which stays as it is.
        name: what to call the image in an error.

    Raises:
        ValueError: it is damaged or truncated, of a kind that is not read, has no pixels, or more than
            `MAX_IMAGE_PIXELS`.
    """
    decoded = _decoded(image, name, stored=False)
    return decoded if isinstance(decoded, Image.Image) else _picture_of(decoded, name)


def _decoded(image: Image.Image | DeepTiff, name: str, stored: bool) -> Image.Image | np.ndarray:
    """See `load_samples`."""
    _check_size(image.height, image.width, name)
    if isinstance(image, DeepTiff):
        samples = image.samples(stored)
        if samples.ndim == 2 and not stored:
            return grey_to_pillow(samples, name)
        return np.atleast_3d(samples)
    if not pillow_reads(image):
        raise ValueError(f"{name} is a TIFF of a kind that Pillow misreads: hand over its path or its bytes instead")
    tags, is_file = getattr(image, "tag_v2", {}), isinstance(image, ImageFile.ImageFile) and image.tile
    if is_file and image.format == "JPEG2000" and image.mode in ("RGB", "RGBA", "LA") and jpeg_2000_bits(image) > 8:
        raise ValueError(f"{name} is a JPEG 2000 in colours of more than 8 bits, which is not read: save it as PNG")
    try:
        deep = deep_colours(image)
        if deep is None:
            image.load()
            if image.getexif().get(_ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)
    except Exception as error:
        raise ValueError(f"{name} is damaged or truncated: it cannot be decoded ({error})") from error
    if deep is not None:
        return deep
    # Pillow inverts samples of up to 8 bits alone. What is returned is no TIFF any more: it is never inverted again.
    inverted = not image.mode.startswith("I;16")
    if tags.get(_PHOTOMETRIC) == 0 and stored == inverted and image.mode in ("1", "L", "I;16", "I;16B"):
        image = Image.fromarray(white_is_zero(np.asarray(image), 8 if inverted else 16))
    return image


def _picture_of(samples: np.ndarray, name: str) -> Image.Image:
    """Colours, or grey and alpha, of more than 8 bits as a Pillow image of 8, by the range rule."""
    _check_finite(samples, name)
    has_alpha = samples.shape[2] in (2, 4)
    colour = _to_eight_bit(samples[:, :, :-1] if has_alpha else samples, rescale=True)
    if has_alpha:
        alpha = (_opacity(samples[:, :, -1:]) * 255).round().astype(np.uint8)
        colour = np.concatenate([colour, alpha], axis=2)
    return Image.fromarray(np.ascontiguousarray(colour))


def to_array(image: Any, name: str, convert_rgb: bool, rescale: bool, channels_last: bool | None = None) -> np.ndarray:
    """Pixels of one image, by the range rule of this module.

    Grey is repeated into three channels; alpha (also a palette's, or a transparent colour) is composited on black.

    Args:
        image: Pillow image of any mode, or a numpy array or torch tensor of 1 to 4 channels (grey, grey and alpha,
            RGB, RGBA), channels first or last, or without a channel axis.
        name: what to call the image in an error.
        convert_rgb: whether to make three channels of it; `False` leaves channels as they are.
        rescale: whether the pixels are to be scaled from 0..255 later. If not, floats are taken as they are.
        channels_last: where the channel axis is; by default, where an axis of 1 or 3 entries is, or else of 2 or 4
            (the first, if both are).

    Returns:
        (height, width, channels), uint8, or float32 for floats if not `rescale`.

    Raises:
        ValueError: for anything else, a NaN or an infinity, no pixels, or more than `MAX_IMAGE_PIXELS`.
    """
    if isinstance(image, Image.Image):
        image = decode(image, name)
        wide = image.mode in ("I", "F") or image.mode.startswith("I;16")
        if convert_rgb and not wide:
            return _rgb_on_black(image, name)
        pixels = np.atleast_3d(np.asarray(image))
    else:
        pixels = _channels_last(as_numpy(image, name), name, channels_last)
    _check_size(pixels.shape[0], pixels.shape[1], name)
    _check_finite(pixels, name)
    has_alpha = convert_rgb and pixels.shape[2] in (2, 4)
    colour = _to_eight_bit(pixels[:, :, :-1] if has_alpha else pixels, rescale)
    if has_alpha:
        composed = colour * _opacity(pixels[:, :, -1:])
        colour = composed.round().astype(np.uint8) if colour.dtype == np.uint8 else composed.astype(np.float32)
    return np.repeat(colour, 3, axis=2) if convert_rgb and colour.shape[2] == 1 else colour


def grey_to_pillow(image: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    """A (height, width) array as a Pillow image of the same range: transformers wants arrays of three axes.

    Numbers whose differences 32 bits cannot hold are brought to 8 by the range rule.
    """
    pixels = as_numpy(image, name)
    _check_size(pixels.shape[0], pixels.shape[1], name)
    if pixels.dtype in (np.bool_, np.uint8, np.uint16):
        return Image.fromarray(pixels)
    if np.can_cast(pixels.dtype, np.int32):
        return Image.fromarray(pixels.astype(np.int32))
    with np.errstate(over="ignore", invalid="ignore"):
        single = pixels.astype(np.float32)
        coarse = np.abs(single - pixels.astype(np.float64)).max(initial=0) > np.ptp(pixels.astype(np.float64)) / 512
    return Image.fromarray(_to_eight_bit(pixels, rescale=True) if coarse else single)


def display_name(source: str | os.PathLike | bytes) -> str:
    """What to call a source in messages: a path whole, however long; a base64 string by its beginning."""
    if isinstance(source, bytes):
        return "bytes"
    if isinstance(source, str) and len(source) > _LONGEST_NAME and not os.path.exists(source):
        return f"{source[:_LONGEST_NAME]}..."
    return os.fspath(source) or "the empty path"


def open_image(source: Path | bytes, name: str) -> Image.Image | DeepTiff:
    """A picture file of a known format, opened and not yet decoded; a ValueError for any other."""
    is_tiff = head_of(source, name).startswith(_TIFF_MAGICS)
    try:
        opened = Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels: at most {MAX_IMAGE_PIXELS:,} are read ({error})") from error
    except Image.UnidentifiedImageError as error:
        if is_tiff:
            return DeepTiff(open_source(source), name)
        raise ValueError(
            f"{name} is not an image, or its header is damaged: neither DICOM nor NIfTI nor .npy, and Pillow finds no "
            f"{', '.join(_FORMATS)}"
        ) from error
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image ({error})") from error
    if not pillow_reads(opened):
        opened.close()
        return DeepTiff(open_source(source), name)
    # Pillow maps a file of known name into memory, and then turns the sides of a TIFF without its pixels.
    opened.filename = ""
    return opened


def _download(address: str, name: str) -> bytes:
    content = bytearray()
    try:
        with get_session().stream("GET", address, follow_redirects=True, timeout=30) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_DOWNLOAD:
                    raise ValueError(f"it has more than {MAX_DOWNLOAD:,} bytes")
    except Exception as error:  # of the HTTP library that huggingface_hub happens to use
        raise ValueError(f"{name} cannot be fetched ({error})") from error
    return bytes(content)


def _rgb_on_black(image: Image.Image, name: str) -> np.ndarray:
    """Pixels of a Pillow image of at most 8 bits a channel."""
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        return np.asarray(image.convert("RGB"))
    except ValueError as error:
        raise ValueError(f"{name} has mode {image.mode}, which cannot be converted to RGB ({error})") from error


def as_numpy(image: Any, name: str) -> np.ndarray:
    """An array or tensor of numbers as a NumPy array; a ValueError for anything else."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = image.float().numpy() if image.dtype == torch.bfloat16 else image.numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{name}: expected a Pillow image, an array, a tensor or a path, got {type(image).__name__}")
    if image.dtype.kind not in "biuf":
        raise ValueError(f"{name}: expected numbers, got an array of {image.dtype}")
    return image


def _channels_last(pixels: np.ndarray, name: str, channels_last: bool | None) -> np.ndarray:
    shape = pixels.shape
    if pixels.ndim == 2:
        return pixels[:, :, None]
    if pixels.ndim != 3:
        raise ValueError(f"{name}: expected 2 or 3 axes, got an array of shape {pixels.shape}")
    if 0 in pixels.shape:
        raise ValueError(f"{name} has no pixels: an array of shape {pixels.shape}")
    if channels_last is None:
        first, last = pixels.shape[0], pixels.shape[2]
        channels_last = first not in (1, 3) and (last in (1, 3) or first not in _CHANNELS)
        if first in (1, 3) and last in (1, 3):
            logger.warning_once(
                f"{name}: in shape {pixels.shape} either the first or the last axis may hold the channels; the first "
                "is taken unless `input_data_format` says otherwise."
            )
    if not channels_last:
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.shape[2] not in _CHANNELS:
        raise ValueError(
            f"{name}: expected 1 to 4 channels, first or last, got an array of shape {shape}. {OPEN_SCAN}"
        )
    return pixels


def _to_eight_bit(pixels: np.ndarray, rescale: bool) -> np.ndarray:
    """The range rule at the top of this module."""
    floating = pixels.dtype.kind == "f"
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels * np.uint8(255)
    if floating and not rescale:
        return pixels.astype(np.float32)
    low, high = float(pixels.min()), float(pixels.max())
    values = pixels.astype(np.float32 if pixels.dtype.itemsize <= 2 else np.float64)
    if floating and low >= 0 and high <= 1:
        values *= 255
    elif low < 0 or high > 255:
        values = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    return values.round().astype(np.uint8)


def _opacity(alpha: np.ndarray) -> np.ndarray:
    """Alpha in [0, 1]: integers against their type's largest value, floats as they are, or against 255 if above 1."""
    if alpha.dtype.kind in "iu":
        return alpha.clip(0) / np.iinfo(alpha.dtype).max
    return (alpha / 255 if alpha.max() > 1 else alpha).clip(0, 1)


def _check_size(height: int, width: int, name: str) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"{name} has no pixels: its height and width are {height} and {width}")
    if height * width > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{name} has {height:,} x {width:,} pixels (height x width): at most {MAX_IMAGE_PIXELS:,} in total are "
            "read. Scale it down first"
        )


def _check_finite(pixels: np.ndarray, name: str) -> None:
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        bad = np.count_nonzero(~np.isfinite(pixels))
        raise ValueError(f"{name}: expected finite pixels, got {bad} of {pixels.size} NaN or infinite")


def _is_nifti(head: bytes) -> bool:
    """By the size of its header, which comes first: 348 bytes, or of version 2 540, and then a magic."""
    sizes = [int.from_bytes(head[:4], order) for order in ("little", "big")]
    return (348 in sizes and len(head) >= 348) or (540 in sizes and head[4:7] in (b"n+2", b"ni2"))


def _is_dicom(head: bytes) -> bool:
    """By the prefix of PS3.10, or, for data sets saved without it, by a plausible first element of group 2 or 8."""
    if head[128:132] == b"DICM":
        return True
    group, element = head[:2], head[2:4]
    little = group in (b"\x02\x00", b"\x08\x00") and element[1:] == b"\x00"
    big = group in (b"\x00\x02", b"\x00\x08") and element[:1] == b"\x00"
    length = int.from_bytes(head[4:8], "little" if little else "big")
    return len(head) >= 8 and (little or big) and (head[4:6].isalpha() and head[4:6].isupper() or length < HEAD_BYTES)
