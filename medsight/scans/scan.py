"""What every scan can do, whatever it was read from: slices to look at, and masks back onto its own grid.

Nothing is allocated before the size that a header claims was held against what is there. Messages name files and never
quote what a header says about a person.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from transformers.utils import logging

from configuration_medsight.configuration_medsight import ORIENTATION
from processing_medsight.image_loading_medsight import MAX_IMAGE_PIXELS, decode, grey_to_pillow, to_array

from .windows import Window, apply_window, is_file_window, no_file_window, parse_window


logger = logging.get_logger(__name__)

# 1024 x 1024 x 1024, or 512 x 512 x 4096: above what scanners make, below what exhausts a workstation.
MAX_VOXELS = 2**30
PLANES = {"axial": "LP", "coronal": "LI", "sagittal": "PI"}  # each in the radiological orientation
_SQUARE = 1.02  # the largest ratio of a pixel's sides that counts as square
_LONGEST = 100  # the largest that is believed


class Scan(ABC):
    """Something of one or several slices; make one by [`open_scan`].

    Example:

    ```python
    import numpy as np

    from medsight import open_scan

    scan = open_scan(np.random.default_rng(0).integers(-1000, 1000, (9, 64, 48)))
    index = scan.choose_slices("middle")[0]
    picture = scan.slice_image(index, window=(40, 400))
    assert (scan.num_slices, index, picture.size) == (9, 4, (48, 64))
    assert scan.to_source({index: np.asarray(picture) > 100}).shape == (9, 64, 48)
    ```

    Attributes:
        name: how to call it in messages (no patient data).
        kind: "image", "array" (of slices), "dicom" or "nifti".
        num_slices: 1 for a picture.
        height, width: of a slice, in its own pixels.
        pixel_aspect: a pixel's height over its width; 1 where it is not known.
        modality: "CT", "MR", "US", ... where the file says so.
        pixel_spacing: mm between rows and between columns, as displayed; `None` where it is not known.
        pixel_mm2: area of a displayed pixel; `None` where it is not known.
        slice_spacing: mm between displayed slices, along their normal; `None` where it is not known or differs from
            slice to slice.
        files: what is behind it, in slice order for a series; empty for bytes and arrays.
        plane: along which a NIfTI volume is cut: "axial", "coronal" or "sagittal"; `None` for what is shown as stored.
        orientation: what lies at the right and at the bottom of its slices, see `orientation_of`; `None` as `plane`.
        is_wide: whether it has grey levels for a window to choose: no colours, and no picture of 8 bits.
        has_window: whether it states a window of its own, for `window="file"`.
        affine: (4, 4), index into what `to_source` returns -> RAS, in mm, or in a NIfTI file's own unit; `None` where
            the file does not say.
    """

    kind: Literal["image", "array", "dicom", "nifti"]

    def __init__(self, name: str, files: Sequence[Path] = ()) -> None:
        self.name = name
        self.files = tuple(files)
        self.num_slices = 1
        self.height = 0
        self.width = 0
        self.modality: str | None = None
        self.pixel_spacing: tuple[float, float] | None = None
        self.pixel_aspect = 1.0
        self.slice_spacing: float | None = None
        self.plane: str | None = None
        self.orientation: str | None = None
        self.affine: np.ndarray | None = None

    @property
    @abstractmethod
    def is_wide(self) -> bool: ...

    @property
    def pixel_mm2(self) -> float | None:
        return None if self.pixel_spacing is None else self.pixel_spacing[0] * self.pixel_spacing[1]

    @property
    def picture_size(self) -> tuple[int, int]:
        """(width, height) of a slice as it is shown: pixels that are not square are drawn out to true proportions."""
        if 1 / _SQUARE <= self.pixel_aspect <= _SQUARE:
            return self.width, self.height
        if self.pixel_aspect > 1:
            return self.width, round(self.height * self.pixel_aspect)
        return round(self.width / self.pixel_aspect), self.height

    @property
    def has_window(self) -> bool:
        return self._stated_window() is not None

    def looks_like_ct(self) -> bool:
        """Whether it is a CT: by its voxels, where a NIfTI file does not say."""
        return self.modality == "CT"

    def facts(self) -> dict[str, Any]:
        """Kind, size, modality and spacing, ready for JSON; nothing about a patient."""
        return {
            "kind": self.kind,
            "slices": self.num_slices,
            "plane": self.plane,
            "orientation": self.orientation,
            "width": self.width,
            "height": self.height,
            "modality": self.modality,
            "pixel_spacing_mm": None if self.pixel_spacing is None else list(self.pixel_spacing),
            "slice_spacing_mm": self.slice_spacing,
        }

    def __repr__(self) -> str:
        return f"<{self.kind} scan {self.name}: {self.num_slices} x {self.height} x {self.width}, {self.modality}>"

    def slice_image(self, index: int, window: str | Sequence[float] | None = None) -> Image.Image:
        """A slice as it is shown, and as the model sees it.

        Args:
            index: from 0; negative ones count from the end.
            window: "abdomen", "lung", "bone", "brain", "soft tissue" (of CT), "file" (the one that the file states:
                of several the first), or (centre, width) in the scan's own grey levels; by default what suits the
                modality (docs/files.md).

        Returns:
            8-bit, mode L or RGB, of `picture_size`.

        Raises:
            ValueError: for a slice that is not there or damaged, or a window that the scan cannot have, or does not
                state.
        """
        shown = self._slice(self._index(index), window)
        if shown.size == self.picture_size:
            return shown
        return shown.resize(self.picture_size, Image.Resampling.BILINEAR)

    def to_grid(self, mask: np.ndarray) -> np.ndarray:
        """A mask of a slice as it is shown, on the slice's own pixels; one that is on these stays as it is.

        Args:
            mask: bool, of `picture_size` or of `width` x `height`.

        Returns:
            (height, width) bool.

        Raises:
            ValueError: for a mask of another size or type.
        """
        mask, size = np.asarray(mask), (self.height, self.width)
        if mask.dtype == np.bool_ and mask.shape == size:
            return mask
        if mask.dtype == np.bool_ and mask.shape == self.picture_size[::-1]:
            return np.asarray(Image.fromarray(mask).resize((self.width, self.height), Image.Resampling.NEAREST))
        expected = " or ".join(f"{h} x {w}" for h, w in dict.fromkeys((size, self.picture_size[::-1])))
        raise ValueError(
            f"mask of {self.name}: expected {expected} bool, got {' x '.join(map(str, mask.shape))} {mask.dtype}"
        )

    def from_grid(self, mask: np.ndarray) -> np.ndarray:
        """A mask on a slice's own pixels, (height, width), as it lies on the slice that is shown: of `picture_size`.

        `to_grid` gives the same mask back: nothing is lost, since pixels are drawn out and never drawn in.
        """
        if self.picture_size == (self.width, self.height):
            return mask
        return np.asarray(Image.fromarray(mask).resize(self.picture_size, Image.Resampling.NEAREST))

    def from_source(self, voxels: np.ndarray, index: int) -> np.ndarray:
        """The part of an array on the source's own grid that a slice shows: what `to_source` puts there.

        Args:
            voxels: of the shape that `to_source` returns.
            index: the displayed slice.

        Returns:
            (height, width), a view.
        """
        shown: np.ndarray = voxels[self._index(index)]
        return shown

    def _slice(self, index: int, window: str | Sequence[float] | None) -> Image.Image:
        """`slice_image`, of `width` x `height`."""
        if window is None:
            return self._default_image(index)
        levels = self._grey_levels(index)
        if levels is None:
            raise ValueError(f"{self.name} is of 8 bits or in colour: it has no grey levels for a window to choose")
        chosen = self._stated_window() if is_file_window(window) else parse_window(window)
        if chosen is None:
            raise ValueError(no_file_window(self.name))
        return Image.fromarray(apply_window(levels, chosen))

    def to_source(self, masks: Mapping[int, np.ndarray]) -> np.ndarray:
        """Masks of displayed slices on the source's own grid.

        Args:
            masks: displayed slice -> bool, as `to_grid` takes it.

        Returns:
            Boolean; `False` on slices without a mask. NIfTI: the voxel array's own three axes (i, j, k). DICOM:
            (frames of the file or instances in the order of `files`, Rows, Columns). Array and TIFF of several pages:
            (slices, height, width). Picture: (height, width).

        Raises:
            ValueError: for a slice that is not there, or a mask of another size or type.
        """
        volume = np.zeros((self.num_slices, self.height, self.width), dtype=bool)
        for index, mask in self._checked(masks).items():
            volume[index] = mask
        return volume

    def choose_slices(self, slices: int | str | Sequence[int]) -> list[int]:
        """Indices of displayed slices.

        Args:
            slices: an index (negative: from the end) or several, also as text ("-1", "0,4"); "middle"; "all";
                "largest-foreground" (the slice that shows most of the body); "a-b", both ends included.

        Raises:
            ValueError: for a slice that is not there, or anything else.
        """
        if slices == "middle":
            return [self.num_slices // 2]
        if slices == "all":
            return list(range(self.num_slices))
        if slices == "largest-foreground":
            shown = (np.asarray(self._slice(index, None).convert("L")) for index in range(self.num_slices))
            # Brighter than a quarter of what is shown.
            return [int(np.argmax([(pixels > 63).sum() for pixels in shown]))]
        if isinstance(slices, str):
            if re.fullmatch(r"-?\d+(,-?\d+)*", slices):
                return [self._index(int(index)) for index in slices.split(",")]
            if ends := re.fullmatch(r"(\d+)-(\d+)", slices):
                first, last = (self._index(int(end)) for end in ends.groups())
                if first <= last:
                    return list(range(first, last + 1))
            raise ValueError(
                f'slices={slices!r}: expected an index (negative: from the end), several ("0,4"), "a-b" with a not '
                'above b, "middle", "all" or "largest-foreground"'
            )
        if isinstance(slices, Sequence):
            return [self._index(index) for index in slices]
        return [self._index(slices)]

    def dicom_datasets(self) -> list[Any]:
        """Headers (`pydicom.Dataset`) without pixels, in the order of `files`; empty for what is not DICOM."""
        return []

    @property
    def nifti_header(self) -> Any:
        """A copy of the NIfTI header; `None` for what is not NIfTI."""
        return None

    def _default_image(self, index: int) -> Image.Image:
        """A slice as it is shown without a window."""
        raise NotImplementedError

    def _grey_levels(self, index: int) -> np.ndarray | None:
        """(height, width) of a slice, for a window; `None` where there are none to choose from."""
        raise NotImplementedError

    def _stated_window(self) -> Window | None:
        """The window that the file states for itself."""
        return None

    def _index(self, index: Any) -> int:
        if isinstance(index, (bool, np.bool_)) or not isinstance(index, (int, np.integer)):
            raise ValueError(f"slice {index!r} of {self.name}: expected an integer")
        if not -self.num_slices <= index < self.num_slices:
            raise ValueError(f"{self.name} has no slice {index}: it has {self.num_slices}, from 0")
        return int(index) % self.num_slices

    def _checked(self, masks: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        return {self._index(index): self.to_grid(mask) for index, mask in masks.items()}

    def _draw_out(self, aspects: Sequence[float]) -> None:
        """Sets `pixel_aspect`, by that of each slice."""
        low, high = min(aspects), max(aspects)
        size = self.width * self.height * max(high, 1 / low)
        if high > low * _SQUARE or max(high, 1 / low) > _LONGEST or size > MAX_IMAGE_PIXELS:
            logger.warning(
                f"{self.name}: its pixels are {low:.3g} to {high:.3g} times as high as wide, which cannot be drawn "
                "out: its slices are shown as they are stored"
            )
        else:
            self.pixel_aspect = aspects[0]


class Picture(Scan):
    """A single picture: a file of Pillow's, an array of 1 to 4 channels, or a .npy file of one."""

    kind = "image"

    def __init__(self, image: Image.Image | np.ndarray, name: str, files: Sequence[Path] = ()) -> None:
        super().__init__(name, files)
        wide = is_wide(image)
        if isinstance(image, Image.Image):
            image = decode(image, name)
        elif image.ndim == 2:
            image = grey_to_pillow(image, name)
        self._values = np.asarray(image) if wide else None
        self._shown = to_picture(image, name)
        self.width, self.height = self._shown.size

    @property
    def is_wide(self) -> bool:
        return self._values is not None

    def _default_image(self, index: int) -> Image.Image:
        return self._shown.copy()

    def _grey_levels(self, index: int) -> np.ndarray | None:
        return self._values

    def to_source(self, masks: Mapping[int, np.ndarray]) -> np.ndarray:
        return super().to_source(masks)[0]

    def from_source(self, voxels: np.ndarray, index: int) -> np.ndarray:
        return voxels


def orientation_of(plane: str) -> str:
    """The orientation that a plane's name stands for; an orientation, such as "AI", as it is.

    Its letters say what is at the right of a slice, and what at its bottom: the patient's left or right (L, R), front
    or back (A, P), head or feet (S, I). So "LP" is the axial slice of the radiological convention.

    Raises:
        ValueError: it is neither.
    """
    orientation = PLANES.get(plane, plane)
    if not ORIENTATION.fullmatch(orientation):
        raise ValueError(
            f"plane={plane!r}: expected one of {', '.join(PLANES)}, or an orientation: what lies at the right and at "
            "the bottom, two letters of L, R, A, P, S and I, such as LP"
        )
    return orientation


def plane_of(orientation: str) -> str:
    """The plane of an orientation: axial where neither head nor feet lie at a side, and so on."""
    if not set(orientation) & set("SI"):
        return "axial"
    return "sagittal" if set(orientation) & set("AP") else "coronal"


def is_wide(image: Image.Image | np.ndarray) -> bool:
    """Whether an image has one channel of more than 8 bits, of which a window can choose."""
    if isinstance(image, Image.Image):
        return image.mode in ("I", "F") or image.mode.startswith("I;16")
    return image.ndim == 2 and image.dtype not in (np.bool_, np.uint8)


def to_picture(image: Image.Image | np.ndarray, name: str) -> Image.Image:
    """An image of any kind as it is shown without a window: 8 bits, mode L or RGB."""
    pixels = to_array(image, name, convert_rgb=True, rescale=True)
    grey = (pixels == pixels[:, :, :1]).all()
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0]) if grey else pixels)
