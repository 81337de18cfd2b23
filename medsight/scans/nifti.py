"""NIfTI volumes as slices in the radiological convention, whatever the orientation of their voxel array.

The voxel axes are reordered and flipped to the nearest right-anterior-superior ones (nothing is resampled, so an
oblique volume is shown along its own axes). An axial slice has anterior at the top and the patient's right at the
left, a coronal one superior at the top and the right at the left, a sagittal one superior at the top and anterior at
the left. Slices go from feet to head, from back to front, and from the patient's left to right. `orientation_of` names
other turns of these planes.
"""

import contextlib
import copy
import gzip
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import logging

from processing_medsight.image_loading_medsight import GZIP_MAGIC, MAX_IMAGE_PIXELS, open_source

from .scan import MAX_VOXELS, Scan, orientation_of, plane_of
from .windows import WINDOWS, Window, apply_window, looks_like_hounsfield, percentile_window


logger = logging.get_logger(__name__)

_MAX_HEADER = 2**24  # extensions stand between header and voxels
# A label map compresses a hundredfold, a bomb a thousandfold; what is small when unpacked may be anything.
_MAX_GZIP_RATIO = 256
_GZIP_RATIO_FREE_BYTES = 2**26
_SAMPLE = 2**20  # voxels that percentiles are taken from
_LABELS = 1002  # NIFTI_INTENT_LABEL
_COLOUR = (128, 2304)  # datatype codes of RGB and RGBA
_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown is taken for what nearly all files mean


class NiftiScan(Scan):
    """A volume of a .nii or .nii.gz file, or of its bytes; see [`open_scan`].

    Args:
        channel: which volume of a 4-D file, from 0; by default the first, with a warning.
        labels: whether it is a label map, which an image must not be.

    Raises:
        ValueError: as `open_scan`; and the file has no such channel, or is a label map of several.
    """

    kind = "nifti"

    def __init__(
        self, source: Path | bytes, name: str, plane: str, channel: int | None = None, labels: bool = False
    ) -> None:
        super().__init__(name, [source] if isinstance(source, Path) else [])
        self._source = source
        with self._open() as file:
            self._header = _read_header(file, name)
        self.shape, self.num_channels = _three_axes(self._header.get_data_shape(), name)
        self._dtype, self._scale = _voxel_type(self._header, name, labels)
        self._offset = self._checked_offset(self._chosen(channel, labels))
        self._levels: Window | None = None
        self._orient(plane)

    def turned(self, plane: str) -> "NiftiScan":
        """The same volume cut along another plane, as `open_scan` takes it; its voxels are read once for both."""
        self._voxels  # noqa: B018
        other = copy.copy(self)
        other._orient(plane)
        return other

    def extensions(self) -> list[bytes]:
        """What stands between header and voxels: the content of each extension."""
        with self._open() as file:
            block = file.read(self._offset)[self._header.sizeof_hdr + 4 :]
        found, number = [], np.dtype(f"{self._header.endianness}i4")
        while len(block) > 8 and 8 < (size := int(np.frombuffer(block[:4], number)[0])) <= len(block):
            found.append(block[8:size])
            block = block[size:]
        return found

    def values(self) -> np.ndarray:
        """(i, j, k) as the file has them: as stored, or scaled where the header says so."""
        return self._voxels if self._scale == (1.0, 0.0) else self._scaled(self._voxels)

    @property
    def nifti_header(self) -> Any:
        return self._header.copy()

    @property
    def pixel_mm2(self) -> float | None:
        return super().pixel_mm2 if self._pixel_mm2 is None else self._pixel_mm2

    @property
    def is_wide(self) -> bool:
        return not self._dtype.names

    def looks_like_ct(self) -> bool:
        return self.is_wide and self._default_window() is WINDOWS["soft tissue"]

    def _default_image(self, index: int) -> Image.Image:
        if (levels := self._grey_levels(index)) is not None:
            return Image.fromarray(apply_window(levels, self._default_window()))
        shown = self._displayed(self._voxels, index)
        return Image.fromarray(np.stack([shown[channel] for channel in "RGB"], axis=2))

    def _grey_levels(self, index: int) -> np.ndarray | None:
        return None if self._dtype.names else self._scaled(self._displayed(self._voxels, index))

    def to_source(self, masks: Mapping[int, np.ndarray]) -> np.ndarray:
        voxels = np.zeros(self.shape, dtype=bool)
        for index, mask in self._checked(masks).items():
            self._displayed(voxels, index)[...] = mask
        return voxels

    def from_source(self, voxels: np.ndarray, index: int) -> np.ndarray:
        return self._displayed(voxels, self._index(index))

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        """The file, unpacked on the way if it is packed."""
        with open_source(self._source) as file:
            self._packed = file.read(2) == GZIP_MAGIC
            file.seek(0)
            yield gzip.GzipFile(fileobj=file, mode="rb") if self._packed else file

    def _chosen(self, channel: int | None, labels: bool) -> int:
        if self.num_channels > 1 and labels:
            raise ValueError(f"{self.name} holds {self.num_channels} volumes: expected a label map of one")
        if channel is None and self.num_channels > 1:
            logger.warning(f"{self.name} holds {self.num_channels} volumes: only the first is used")
        if not 0 <= (channel or 0) < self.num_channels:
            raise ValueError(f"{self.name} has no channel {channel}: it has {self.num_channels}, from 0")
        return channel or 0

    def _checked_offset(self, channel: int) -> int:
        """The byte at which the voxels begin, if the file can hold as many as the header claims."""
        offset = float(self._header["vox_offset"])
        if not self._header.sizeof_hdr <= offset <= _MAX_HEADER:
            raise ValueError(f"{self.name} has a damaged header: it puts the voxels at byte {offset:g}")
        size = math.prod(self.shape) * self._dtype.itemsize
        needed = int(offset) + (channel + 1) * size
        held = len(self._source) if isinstance(self._source, bytes) else self._source.stat().st_size
        if self._packed and needed > max(_GZIP_RATIO_FREE_BYTES, _MAX_GZIP_RATIO * held):
            raise ValueError(
                f"{self.name} would unpack from {held:,} to {needed:,} bytes: more than {_MAX_GZIP_RATIO}-fold is "
                "refused. Unpack it yourself if you trust it"
            )
        if not self._packed and held < needed:
            raise ValueError(
                f"{self.name} is truncated: its header claims {needed:,} bytes ({' x '.join(map(str, self.shape))} "
                f"voxels of {self._dtype}), the file holds {held:,}"
            )
        return int(offset) + channel * size

    def _orient(self, plane: str) -> None:
        import nibabel

        self.orientation = orientation_of(plane)
        self.plane = plane_of(self.orientation)
        toward_right, toward_bottom = ("RLAPSI".index(letter) // 2 for letter in self.orientation)
        self._axes = toward_right, toward_bottom, 3 - toward_right - toward_bottom  # of right, anterior, superior
        self._steps = [1 if letter in "RAS" else -1 for letter in self.orientation]  # along the first two of them
        self.pixel_aspect = 1.0
        self._pixel_mm2: float | None = None
        affine = _affine(self._header)
        if affine is None:
            logger.warning(f"{self.name} has no usable affine: its axes are taken for right, anterior and superior")
        self._orientation = nibabel.io_orientation(np.eye(4) if affine is None else affine)
        unit = _MM_PER_UNIT.get(int(self._header["xyzt_units"]) & 7, 1.0)
        stated = self._header["pixdim"][1:4].astype(float)
        sizes = unit * (stated if affine is None else nibabel.affines.voxel_sizes(affine))
        source_axis = [int(np.flatnonzero(self._orientation[:, 0] == axis)[0]) for axis in self._axes]
        self.width, self.height, self.num_slices = (self.shape[axis] for axis in source_axis)
        if self.width * self.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"{self.name} has slices of {self.height:,} x {self.width:,} pixels: too many")
        across, down, through = (float(size) if 0 < size < np.inf else None for size in sizes[source_axis])
        self.pixel_spacing = None if down is None or across is None else (down, across)
        self.slice_spacing = through
        if affine is not None:
            self.affine = affine
            axes = unit * affine[:3, source_axis]
            pixel = float(np.linalg.norm(np.cross(axes[:, 0], axes[:, 1])))
            distance = float(abs(np.linalg.det(axes)) / pixel)
            right_angles = sizes[source_axis[:2]].prod(), sizes[source_axis[2]]
            if not np.allclose((pixel, distance), right_angles):  # as of a tilted gantry
                self._pixel_mm2, self.slice_spacing = pixel, distance
        if self.pixel_spacing is not None:
            self._draw_out([self.pixel_spacing[0] / self.pixel_spacing[1]])

    def _displayed(self, voxels: np.ndarray, index: int) -> np.ndarray:
        """A view of a slice as it is shown: what is written to it is in its place in `voxels`."""
        import nibabel

        canonical = nibabel.apply_orientation(voxels, self._orientation)
        across, down, through = self._axes
        columns, rows = self._steps
        return canonical.transpose(through, down, across)[index, ::rows, ::columns]

    @cached_property
    def _voxels(self) -> np.ndarray:
        """As stored: of a packed file in memory, of another one mapped from it."""
        from nibabel.volumeutils import array_from_file

        try:
            with self._open() as file:
                voxels: np.ndarray = array_from_file(self.shape, self._dtype, file, self._offset, mmap="r")
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{self.name} is damaged or truncated: its voxels cannot be read") from error
        return voxels

    def _scaled(self, voxels: np.ndarray) -> np.ndarray:
        slope, intercept = self._scale
        with np.errstate(over="ignore", invalid="ignore"):
            return voxels.astype(np.float64) * slope + intercept

    def _stated_window(self) -> Window | None:
        """From `cal_min` to `cal_max`, where they are set."""
        low, high = float(self._header["cal_min"]), float(self._header["cal_max"])
        stated = np.isfinite([low, high]).all() and high > low and not self._dtype.names
        return Window((low + high) / 2, high - low) if stated else None

    def _default_window(self) -> Window:
        if self._levels is None:
            voxels = self._voxels.reshape(-1, order="F")
            step = max(1, len(voxels) // _SAMPLE)
            while math.gcd(step, len(voxels)) > 1:  # a common factor would pass over whole planes
                step += 1
            sample = self._scaled(voxels[::step])
            self._levels = WINDOWS["soft tissue"] if looks_like_hounsfield(sample) else percentile_window(sample)
        return self._levels


def _read_header(file: Any, name: str) -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise ValueError(f'{name} is NIfTI, which needs nibabel: pip install "medsight[medical]"') from error
    try:
        start = file.read(nibabel.Nifti2Header.sizeof_hdr)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name} is damaged or truncated: its header cannot be unpacked") from error
    second = nibabel.Nifti2Header.sizeof_hdr in (int.from_bytes(start[:4], order) for order in ("little", "big"))
    kind = nibabel.Nifti2Header if second else nibabel.Nifti1Header
    magic = start[4:7] if second else start[344:347]
    if magic in (b"ni1", b"ni2"):
        raise ValueError(f"{name} is a NIfTI header whose voxels are in another file: save both as one .nii")
    if magic not in (b"n+1", b"n+2"):
        raise ValueError(f"{name} is no NIfTI (Analyze 7.5, or a damaged header): save it as .nii")
    try:
        return kind(start[: kind.sizeof_hdr], check=False)
    except Exception as error:
        raise ValueError(f"{name} has a damaged NIfTI header") from error


def _affine(header: Any) -> np.ndarray | None:
    """The sform or else the qform, whichever is stated and can be turned round; `None` where neither is."""
    import nibabel

    squares = sum(float(header[f"quatern_{axis}"]) ** 2 for axis in "bcd")
    if squares > 1:  # by rounding: a half turn, of length 1, as nifti_quatern_to_mat44 has it
        for axis in "bcd":
            header[f"quatern_{axis}"] /= np.sqrt(squares)
    for kind in ("sform", "qform"):
        if int(header[f"{kind}_code"]) <= 0:
            continue
        with contextlib.suppress(ValueError, nibabel.spatialimages.HeaderDataError):
            affine = getattr(header, f"get_{kind}")()
            if np.isfinite(affine).all() and np.linalg.cond(affine[:3, :3]) < 1e12:
                return affine
    return None


def _three_axes(shape: Sequence[int], name: str) -> tuple[tuple[int, int, int], int]:
    """The first three axes of a header's shape, and how many volumes of them there are."""
    if not 1 <= len(shape) <= 7 or min(shape) < 1:
        raise ValueError(f"{name} has a damaged header: it claims a shape of {tuple(map(int, shape))}")
    first, second, third, *more = (int(size) for size in (*shape, 1, 1)[: max(3, len(shape))])
    if first * second * third > MAX_VOXELS:
        raise ValueError(f"{name} claims {first:,} x {second:,} x {third:,} voxels: at most {MAX_VOXELS:,} are read")
    if math.prod(more[1:]) > 1:
        raise ValueError(f"{name} holds several values a voxel (vectors or tensors): save one of them as a volume")
    return (first, second, third), math.prod(more)


def _voxel_type(header: Any, name: str, labels: bool) -> tuple[np.dtype, tuple[float, float]]:
    """The type of a stored voxel, and what scales it."""
    if int(header["intent_code"]) == _LABELS and not labels:
        raise ValueError(f"{name} says that it is a label map, not an image")
    try:
        dtype = header.get_data_dtype()
    except Exception as error:
        raise ValueError(f"{name}: unknown voxel type {int(header['datatype'])}") from error
    if int(header["datatype"]) not in _COLOUR and (dtype.kind not in "iuf" or dtype.itemsize > 8):
        raise ValueError(f"{name} has voxels of {dtype}: expected integers, floats of up to 64 bits, or RGB")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return dtype, (1.0, 0.0)
    if not np.isfinite(intercept):
        raise ValueError(f"{name} has a damaged header: its intercept is {intercept}")
    return dtype, (slope, intercept)
