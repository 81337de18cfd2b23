"""Slices of one size without a place in a patient: an array of three axes, or the pages of a TIFF."""

import threading
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from processing_medsight.deep_images_medsight import DeepTiff
from processing_medsight.image_loading_medsight import MAX_IMAGE_PIXELS, count_frames, decode, open_image

from .scan import MAX_VOXELS, Scan, is_wide, to_picture
from .windows import Window, apply_window, percentile_window, sampled_slices


class Stack(Scan):
    """Grey levels of 8 bits, and colours, are shown as they are; wider ones by percentiles of the whole stack."""

    def __init__(self, shape: tuple[int, ...], name: str, files: Sequence[Path]) -> None:
        super().__init__(name, files)
        self.num_slices, self.height, self.width = num_slices, height, width = shape
        size = f"{num_slices:,} slices of {height:,} x {width:,} pixels"
        if min(num_slices, height, width) < 1:
            raise ValueError(f"{name} has no pixels: {size}")
        if height * width > MAX_IMAGE_PIXELS or num_slices * height * width > MAX_VOXELS:
            raise ValueError(
                f"{name} has {size}: at most {MAX_IMAGE_PIXELS:,} a slice, {MAX_VOXELS:,} in all are read"
            )
        self._levels: Window | None = None

    @abstractmethod
    def _page(self, index: int) -> np.ndarray | Image.Image:
        """A slice as it is stored: (height, width), or an image of any mode."""

    @property
    def is_wide(self) -> bool:
        return is_wide(self._page(0))

    def _default_image(self, index: int) -> Image.Image:
        page = self._page(index)
        if not is_wide(page):
            return to_picture(page, self.name)
        if self._levels is None:
            sample = [np.asarray(self._page(sampled)) for sampled in sampled_slices(self.num_slices)]
            self._levels = percentile_window(np.stack(sample))
        return Image.fromarray(apply_window(np.asarray(page), self._levels))

    def _grey_levels(self, index: int) -> np.ndarray | None:
        page = self._page(index)
        in_colour = isinstance(page, Image.Image) and page.mode != "L" and not is_wide(page)
        return None if in_colour else np.asarray(page)


class ArrayStack(Stack):
    """An array of (slices, height, width) numbers; see [`open_scan`]."""

    kind = "array"

    def __init__(self, array: np.ndarray, name: str, files: Sequence[Path]) -> None:
        super().__init__(array.shape, name, files)
        self._array = array

    def _page(self, index: int) -> np.ndarray:
        return self._array[index]


class PageStack(Stack):
    """The pages of a TIFF, decoded when they are asked for; see [`tiff_pages`]."""

    kind = "image"

    def __init__(self, opened: Image.Image | DeepTiff, name: str, files: Sequence[Path]) -> None:
        self._opened, self._lock = opened, threading.Lock()
        weakref.finalize(self, opened.close)
        self.name = name
        width, height = self._decode(0).size
        super().__init__((count_frames(opened, name), height, width), name, files)

    def _page(self, index: int) -> Image.Image:
        page = self._decode(index)
        if page.size != (self.width, self.height):
            raise ValueError(f"{self.name}, page {index} is of another size than the first")
        return page

    def _decode(self, index: int) -> Image.Image:
        with self._lock:
            _seek(self._opened, index, self.name)
            return decode(self._opened, f"{self.name}, page {index}").copy()


def tiff_pages(source: Path | bytes, name: str) -> Image.Image | DeepTiff | None:
    """The opened file, if it is a TIFF of several pages of one size and mode: `None` for any other picture.

    Raises:
        ValueError: it cannot be read.
    """
    opened = open_image(source, name)
    count = count_frames(opened, name) if opened.format == "TIFF" else 1
    pages = set()
    for index in range(count):
        _seek(opened, index, name)
        pages.add((opened.size, opened.mode))
    if count > 1 and len(pages) == 1:
        return opened
    opened.close()
    return None


def _seek(opened: Image.Image | DeepTiff, index: int, name: str) -> None:
    try:
        opened.seek(index)
    except Exception as error:
        raise ValueError(f"{name}, page {index} is damaged or truncated ({error})") from error
