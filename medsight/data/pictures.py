"""Images and masks of training data, decoded wholly or refused with the name of their file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from processing_medsight.image_loading_medsight import load_image, load_samples, to_array


# What a row holds for a picture, as `datasets.Image(decode=False)` yields it: {"path", "bytes"}.
PictureEntry = Mapping[str, Any]

_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP")


class MaskSizeError(ValueError):
    """A mask is not of the size of its image."""


class EmptyMaskError(ValueError):
    """A mask has no pixel inside."""


def picture_name(entry: PictureEntry) -> str:
    """What an error calls a picture: its path, or where its bytes came from."""
    return entry.get("path") or "a picture without a name"


def read_picture(entry: PictureEntry) -> Image.Image:
    """Decode an image wholly, in its own mode (a 16-bit scan stays 16-bit), turned upright if EXIF says so.

    Args:
        entry: `{"path": ..., "bytes": ...}`, of which the bytes count where there are any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, truncated, damaged or no image at all, has too many pixels, or holds NaN or infinity.
    """
    image: Image.Image = _read(entry, load_image)
    return image


def _read(entry: PictureEntry, load: Any) -> Any:
    """What `load` makes of the bytes or the path of an entry."""
    name, content = picture_name(entry), entry.get("bytes")
    if content is not None:
        image = load(content, name)
    elif entry.get("path") is None:
        raise ValueError(f"{name}: expected the path or the bytes of a picture, got neither")
    elif not os.path.exists(name):
        raise FileNotFoundError(f"{name}: no such image file")
    else:
        image = load(Path(name))
    if isinstance(image, np.ndarray) or image.mode == "F":
        to_array(image, name, convert_rgb=False, rescale=True)  # refuses NaN and infinity
    return image


def read_mask(entry: PictureEntry, size: tuple[int, int]) -> np.ndarray:
    """Decode a mask; every pixel that the file stores as anything but 0 (but black, in colours) is inside.

    In a file of a kind that blurs what was black and white, see `_LOSSY`, the pixels above half of its brightest are.

    Args:
        entry: as for `read_picture`.
        size: (width, height) of its image in pixels, as `PIL.Image.Image.size` is.

    Returns:
        (height, width), bool, with at least one pixel inside.

    Raises:
        FileNotFoundError: there is no such file.
        MaskSizeError, EmptyMaskError: the mask is of another size than its image, or has no pixel inside.
        ValueError: as `read_picture`.
    """
    name, image = picture_name(entry), _read(entry, load_samples)
    if isinstance(image, np.ndarray):  # of more bits than a picture of Pillow's has; its second or fourth is alpha
        image = Image.fromarray((image[:, :, : 3 if image.shape[2] > 2 else 1] != 0).any(axis=2))
    if image.size != tuple(size):
        raise MaskSizeError(
            f"{name}: the mask is {image.width}x{image.height} pixels (width x height), its image {size[0]}x{size[1]}"
        )
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
    else:
        values = to_array(image, name, convert_rgb=True, rescale=True).max(axis=2)
    mask = values > values.max() / 2 if image.format in _LOSSY else values != 0
    if not mask.any():
        raise EmptyMaskError(f"{name}: the mask is empty; a structure that is not in the image has no mask")
    return mask
