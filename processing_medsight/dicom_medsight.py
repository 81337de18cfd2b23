"""DICOM images: one file of one or several frames, or the files of a series, sorted along the normal of the slices.

Frames are shown as they are stored, which is how DICOM means them to be looked at. Whatever pydicom says about a file
may quote what the file says about a person: no message of its own is passed on.
"""

import importlib.util
import logging
import math
import os
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from transformers.utils import logging as transformers_logging

from .file_kinds_medsight import recognise
from .image_loading_medsight import MAX_IMAGE_PIXELS
from .scan_medsight import Scan, warn_of_oblong_pixels
from .windows_medsight import WINDOWS, Window, apply_window, file_window, parse_window, percentile_window


logger = transformers_logging.get_logger(__name__)

MAX_FRAMES = 2**17  # tiles of a whole slide
MAX_FILE_BYTES = 2**31
MAX_INFLATED_BYTES = 2**28  # of a deflated data set
MAX_SERIES_FILES = 2**14
_SAMPLED_SLICES = 16  # that percentiles are taken from
_TOLERANCE = 0.01  # of the distance between slices, and of direction cosines
_DEFLATED = "1.2.840.10008.1.2.1.99"
_NOT_IMAGES = {"SEG": "a segmentation", "RTDOSE": "a dose distribution"}  # though they hold pixels
_BY_PERCENTILES = ("MR", "PT", "NM")  # grey levels without a scale that windows of files agree on
_HEAD = ("HEAD", "BRAIN")
_UNDECODED = "it is damaged, or of a kind that the installed decoders do not read"
_READING = threading.RLock()  # warnings and log levels are the whole process's


class _Refused(ValueError):
    """An error whose message is ours."""


class DicomScan(Scan):
    """The frames of one file, or the instances of a series; see [`open_scan`]."""

    kind = "dicom"

    def __init__(self, sources: Sequence[Path | bytes], name: str) -> None:
        super().__init__(name)
        headers = [read_header(source, _name_of(source, name)) for source in sources]
        with guarded(name, "its header is damaged"):
            if len(sources) > 1:
                headers, sources = _as_series(headers, sources, name)
            self._headers, self._sources = headers, list(sources)
            self.files = tuple(source for source in sources if isinstance(source, Path))
            first = headers[0]
            self.num_slices = len(headers) if len(headers) > 1 else number_of_frames(first)
            self.height, self.width = int(first.Rows), int(first.Columns)
            self.modality = _code(first.get("Modality"))
            self._colour = int(first.get("SamplesPerPixel") or 1) == 3 or _photometric(first) == "PALETTE COLOR"
            self._place()
        self._decoded: tuple[int, Any] | None = None
        self._levels: Window | None = None
        warn_of_oblong_pixels(self)

    def dicom_datasets(self) -> list[Any]:
        return list(self._headers)

    def slice_image(self, index: int, window: str | Sequence[float] | None = None) -> Image.Image:
        index = self._index(index)
        with guarded(self._slice_name(index), _UNDECODED):
            if self._colour:
                if window is not None:
                    raise _Refused(f"{self.name} is in colour: it has no grey levels for a window to choose")
                return Image.fromarray(self._colour_pixels(index))
            if isinstance(window, str) and self.modality not in (None, "CT"):
                raise _Refused(
                    f"window={window!r} is of CT, but {self.name} is {self.modality}: give centre and width"
                )
            chosen = None if window is None else parse_window(window)
            values, padding = self._grey_values(index)
            shown = self._shown_by_default(index, values) if chosen is None else apply_window(values, chosen)
            if _photometric(self._headers[0]) == "MONOCHROME1":
                shown = 255 - shown
            shown[padding] = 0
            return Image.fromarray(shown)

    def to_source(self, masks: Mapping[int, np.ndarray]) -> np.ndarray:
        volume = np.zeros((self.num_slices, self.height, self.width), dtype=bool)
        for index, mask in self._checked(masks).items():
            volume[index] = mask
        return volume

    def _slice_name(self, index: int) -> str:
        if len(self._sources) > 1:
            return _name_of(self._sources[index], self.name)
        return self.name if self.num_slices == 1 else f"{self.name}, frame {index}"

    def _header(self, index: int) -> tuple[Any, int]:
        """The header behind a slice, and the slice's frame in that file."""
        return (self._headers[index], 0) if len(self._headers) > 1 else (self._headers[0], index)

    def _place(self) -> None:
        """Spacing and affine, from the positions that the headers state."""
        spacing = _numbers(_measures(*self._header(0)).get("PixelSpacing"), 2)
        if spacing is not None and min(spacing) > 0:
            self.pixel_spacing = spacing[0], spacing[1]
        directions = _directions(*self._header(0))
        positions = [_position(*self._header(index)) for index in range(self.num_slices)]
        same = [_directions(*self._header(index)) for index in range(self.num_slices)]
        if (
            directions is None
            or any(p is None for p in positions)
            or any(d is None or np.abs(d - directions).max() > _TOLERANCE for d in same)
        ):
            return
        places = np.array(positions)
        measures = _measures(*self._header(0))
        normal = np.cross(*directions)
        if self.num_slices == 1:
            step = (_numbers(measures.get("SpacingBetweenSlices") or measures.get("SliceThickness"), 1) or (0.0,))[0]
            self.slice_spacing = abs(step) or None
            through = normal * (abs(step) or 1)
        else:
            through = (places[-1] - places[0]) / (self.num_slices - 1)
            even = places[0] + np.arange(self.num_slices)[:, None] * through
            distance = float(np.linalg.norm(through))
            if not distance or np.abs(places - even).max() > _TOLERANCE * distance * 5:
                logger.warning(f"{self.name}: its slices are not evenly spaced, so no volume can be measured")
                return
            self.slice_spacing = abs(float(through @ normal)) or None
        if self.pixel_spacing is None:
            return
        affine = np.eye(4)
        affine[:3, 0] = through
        affine[:3, 1] = directions[1] * self.pixel_spacing[0]
        affine[:3, 2] = directions[0] * self.pixel_spacing[1]
        affine[:3, 3] = places[0]
        self.affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM's axes go to the left and to the back

    def _stored(self, index: int) -> np.ndarray:
        """(Rows, Columns) or (Rows, Columns, 3) as stored, decompressed; YBR as RGB."""
        from pydicom.pixels import pixel_array

        file, frame = (index, 0) if len(self._sources) > 1 else (0, index)
        if self._decoded is None or self._decoded[0] != file:
            self._decoded = file, _read_whole(self._sources[file], self._slice_name(index))
        dataset = self._decoded[1]
        _check_codestream(dataset, frame, self._slice_name(index))
        try:
            pixels = pixel_array(dataset, index=frame)
        except RuntimeError:  # of all decoders that are there
            syntax = dataset.file_meta.TransferSyntaxUID
            if (package := _missing_decoder(syntax)) is None:
                raise
            raise _Refused(
                f"{self._slice_name(index)} is compressed as {syntax.name}, which the decoders that are installed do "
                f"not read, or damaged: pip install pylibjpeg {package}"
            ) from None
        colours = (3,) if int(dataset.get("SamplesPerPixel") or 1) == 3 else ()
        if pixels.shape != (self.height, self.width, *colours):
            raise _Refused(f"{self._slice_name(index)} is damaged: its pixels are not of the size its header claims")
        return pixels

    def _colour_pixels(self, index: int) -> np.ndarray:
        from pydicom.pixels import apply_color_lut

        header = self._headers[0]
        pixels = self._stored(index)
        bits = int(header.BitsStored)
        if _photometric(header) == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, header)
            bits = 8 * pixels.itemsize
        if pixels.dtype.kind != "u" or pixels.shape != (self.height, self.width, 3):
            raise _Refused(f"{self.name} has colours of an unknown kind")
        return (pixels >> (bits - 8) if bits > 8 else pixels).astype(np.uint8)

    def _grey_values(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(Rows, Columns) in the modality's own grey levels, and where there is nothing but padding."""
        from pydicom.pixels import apply_modality_lut

        header, frame = self._header(index)
        stored = self._stored(index)
        padding = np.zeros(stored.shape, dtype=bool)
        if (value := _numbers(header.get("PixelPaddingValue"), 1)) is not None:
            limit = _numbers(header.get("PixelPaddingRangeLimit"), 1) or value
            padding = (stored >= min(value[0], limit[0])) & (stored <= max(value[0], limit[0]))
        rescale = _group(header, frame, "PixelValueTransformationSequence")
        values = apply_modality_lut(stored, rescale if "RescaleSlope" in rescale else header)
        return values, padding

    def _shown_by_default(self, index: int, values: np.ndarray) -> np.ndarray:
        from pydicom.pixels import apply_voi

        header, frame = self._header(index)
        rescale = _group(header, frame, "PixelValueTransformationSequence")
        scaled = "RescaleIntercept" in rescale or "RescaleIntercept" in header
        if self.modality == "CT" and scaled:
            head = _code(header.get("BodyPartExamined")) in _HEAD
            return apply_window(values, WINDOWS["brain" if head else "soft tissue"])
        if self.modality not in _BY_PERCENTILES:
            voi = _group(header, frame, "FrameVOILUTSequence")
            voi = voi if "WindowCenter" in voi else header
            if voi.get("VOILUTSequence"):
                bits = int(voi.VOILUTSequence[0].LUTDescriptor[2])
                shown = apply_voi(values.astype(np.int64), voi)
                return (shown.astype(np.float64) * (255 / (2**bits - 1))).clip(0, 255).round().astype(np.uint8)
            centre, width = (_numbers(voi.get(key), None) for key in ("WindowCenter", "WindowWidth"))
            if centre and width:
                window = file_window(centre[0], width[0], _code(voi.get("VOILUTFunction")) or "LINEAR")
                if window is not None:
                    return apply_window(values, window)
            if int(header.get("BitsStored") or 16) <= 8 and not scaled and values.dtype.kind == "u":
                top = 2 ** int(header.BitsStored) - 1
                return apply_window(values, Window(top / 2, top))
        if self._levels is None:
            count = min(self.num_slices, _SAMPLED_SLICES)
            sampled = [self._grey_values(i * self.num_slices // count) for i in range(count)]
            shown_values = np.concatenate([one[~hidden] for one, hidden in sampled])
            self._levels = percentile_window(shown_values[np.isfinite(shown_values)])
        return apply_window(values, self._levels)


def series_files(folder: Path, name: str) -> list[Path]:
    """The DICOM files of a folder (not of the folders in it), by name.

    Raises:
        ValueError: if it holds none, or more than `MAX_SERIES_FILES` files.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if len(files) > MAX_SERIES_FILES:
        raise ValueError(f"{name} holds {len(files):,} files: a series of at most {MAX_SERIES_FILES:,} is read")
    found = []
    for path in files:
        with path.open("rb") as file:
            try:
                dicom = recognise(file, str(path)) == "dicom"
            except ValueError:
                dicom = False
        if dicom and path.name != "DICOMDIR":
            found.append(path)
    if not found:
        raise ValueError(f"{name} is a folder without a DICOM file: name a file, or the folder of one DICOM series")
    if len(found) < len(files):
        logger.warning(f"{name}: {len(files) - len(found)} of {len(files)} files are not DICOM and were left out")
    return found


@contextmanager
def guarded(name: str, problem: str) -> Iterator[None]:
    """Turn whatever pydicom and its decoders raise into a ValueError, and keep them from writing about a person."""
    own = logging.getLogger("pydicom")
    with _READING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level, own.level = own.level, logging.CRITICAL + 1
        try:
            yield
        except _Refused:
            raise
        except Exception as error:
            raise _Refused(f"{name}: {problem} ({type(error).__name__})") from None
        finally:
            own.level = level


def read_header(source: Path | bytes, name: str) -> Any:
    """A data set without its pixels, whose sizes were held against the bytes that are there.

    Raises:
        ValueError: for a damaged file, one that is no image, or sizes that are absurd.
    """
    try:
        import pydicom
    except ImportError as error:
        raise ValueError(f'{name} is DICOM, which needs pydicom: pip install "medsight[medical]"') from error
    with guarded(name, "it is damaged: its DICOM header cannot be read"), _stream(source, name) as file:
        dataset = pydicom.dcmread(file, stop_before_pixels=True, force=True)
        here = file.tell()
        element = 8 if dataset.original_encoding[0] else 12  # tag, representation and length of the pixels
        length = file.seek(0, os.SEEK_END) - here - element
        _set_transfer_syntax(dataset)
        _check_is_image(dataset, length, name)
        _check_sizes(dataset, length, name)
        return dataset


def number_of_frames(dataset: Any) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def _read_whole(source: Path | bytes, name: str) -> Any:
    import pydicom

    with _stream(source, name) as file:
        if file.seek(0, os.SEEK_END) > MAX_FILE_BYTES:
            raise _Refused(f"{name} is larger than {MAX_FILE_BYTES:,} bytes")
        file.seek(0)
        dataset = pydicom.dcmread(file, force=True)
    _set_transfer_syntax(dataset)
    return dataset


@contextmanager
def _stream(source: Path | bytes, name: str) -> Iterator[BinaryIO]:
    """The file as pydicom may read it; one that was deflated as a whole comes inflated, up to a limit."""
    from pydicom.filereader import read_dataset

    file: BinaryIO = BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    with file:
        prefix = 132 if file.read(132)[128:] == b"DICM" else 0
        file.seek(prefix)
        if file.read(2) != b"\x02\x00":
            file.seek(0)
            yield file
            return
        file.seek(prefix)
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        for element in meta:  # an implicit one would be read again, and otherwise, by pydicom
            element.value  # noqa: B018
        if meta.get("TransferSyntaxUID") != _DEFLATED:
            file.seek(0)
            yield file
            return
        unpack = zlib.decompressobj(-zlib.MAX_WBITS)
        inflated = unpack.decompress(file.read(), MAX_INFLATED_BYTES)
        if unpack.unconsumed_tail:
            raise _Refused(f"{name} inflates to more than {MAX_INFLATED_BYTES:,} bytes")
        if not unpack.eof:
            raise _Refused(f"{name} is truncated")
        yield BytesIO(inflated)


def _set_transfer_syntax(dataset: Any) -> None:
    """Say how a data set without a transfer syntax is encoded, or one that was inflated."""
    import pydicom

    implicit, little = dataset.original_encoding
    if not getattr(dataset, "file_meta", None):
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
    if not dataset.file_meta.get("TransferSyntaxUID"):
        explicit = pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else explicit


def _check_is_image(dataset: Any, length: int, name: str) -> None:
    from pydicom.uid import UID_dictionary

    known = UID_dictionary.get(str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")))
    what = known[0].removesuffix(" Storage") if known else None
    kind = _NOT_IMAGES.get(_code(dataset.get("Modality")) or "")
    if kind is None and "DirectoryRecordSequence" in dataset:
        kind = "a directory of other files"
    if kind is None and (
        length <= 0 or not {"Rows", "Columns", "BitsAllocated"} <= set(dataset.dir("Rows", "Columns", "Bits"))
    ):
        kind = "an object without pixels"
    if kind is not None:
        raise _Refused(f"{name} is no image but {kind}" + (f" ({what})" if what else ""))


def _check_sizes(dataset: Any, length: int, name: str) -> None:
    """Rows x columns x frames against the bytes that follow the header."""
    from pydicom.uid import UID

    rows, columns, frames = int(dataset.Rows), int(dataset.Columns), number_of_frames(dataset)
    samples, bits = int(dataset.get("SamplesPerPixel") or 1), int(dataset.BitsAllocated)
    if min(rows, columns, frames) < 1 or samples not in (1, 3) or bits not in (1, 8, 16, 32, 64):
        raise _Refused(
            f"{name} has a damaged header: {frames} frames of {rows} x {columns} pixels of {samples} x {bits} bits"
        )
    if rows * columns > MAX_IMAGE_PIXELS or frames > MAX_FRAMES:
        raise _Refused(
            f"{name} claims {frames:,} frames of {rows:,} x {columns:,} pixels: at most {MAX_FRAMES:,} of "
            f"{MAX_IMAGE_PIXELS:,} in total are read"
        )
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    packed = syntax.is_private or syntax.is_encapsulated
    share = 2 / 3 if _photometric(dataset) in ("YBR_FULL_422", "YBR_PARTIAL_422") else 1
    needed = 8 * frames if packed else math.ceil(rows * columns * samples * frames * bits * share / 8)
    if needed > length:
        raise _Refused(
            f"{name} is truncated: its header claims {frames:,} frames of {rows:,} x {columns:,} pixels, which do not "
            f"fit into the {max(length, 0):,} bytes that follow it"
        )


def _check_codestream(dataset: Any, frame: int, name: str) -> None:
    """Hold a compressed frame's own size against the header's: decoders allocate what the frame says."""
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder
    from pydicom.uid import RLELossless

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise _Refused(f"{name} is compressed as {syntax.name}, which pydicom cannot decode") from None
    if not decoder.is_available:
        package = _missing_decoder(syntax) or "pylibjpeg-libjpeg"
        raise _Refused(f"{name} is compressed as {syntax.name}: pip install pylibjpeg {package}")
    if syntax == RLELossless:
        return
    tables = [dataset.get(key) for key in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
    offsets = (tables[0], tables[1]) if all(tables) else None
    frames = number_of_frames(dataset)
    stream = get_frame(dataset.PixelData, frame, number_of_frames=frames, extended_offsets=offsets)
    size = codestream_size(stream)
    if size is not None and size != (int(dataset.Rows), int(dataset.Columns)):
        raise _Refused(f"{name} is damaged: its header and its compressed pixels claim different sizes")


def _missing_decoder(syntax: Any) -> str | None:
    """The package that decodes a transfer syntax, if it is not installed."""
    module = "openjpeg" if "2000" in syntax.name else "libjpeg" if "JPEG" in syntax.name else None
    if module is None or all(map(_installed, (module, "pylibjpeg"))):
        return None
    return f"pylibjpeg-{module}"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # hidden from this process
        return False


def codestream_size(stream: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG, JPEG-LS or JPEG 2000 stream by its own header; `None` where it has none."""
    siz = stream.find(b"\xff\x4f\xff\x51", 0, 4096)
    if siz >= 0:
        right, bottom, left, top = (int.from_bytes(stream[siz + at : siz + at + 4], "big") for at in (8, 12, 16, 20))
        return bottom - top, right - left
    at = 2
    while stream[:2] == b"\xff\xd8" and at + 9 <= len(stream):
        if stream[at] != 0xFF:
            at += 1
            continue
        marker = stream[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) or marker == 0xF7:
            return int.from_bytes(stream[at + 5 : at + 7], "big"), int.from_bytes(stream[at + 7 : at + 9], "big")
        bare = marker in (0x01, 0xFF) or 0xD0 <= marker <= 0xD8
        at += (1 if marker == 0xFF else 2) if bare else 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return None


def _as_series(headers: list[Any], sources: Sequence[Any], name: str) -> tuple[list[Any], list[Any]]:
    """The instances of the one series in order, or a reason why they are no series."""
    series = Counter(str(header.get("SeriesInstanceUID")) for header in headers)
    if len(series) > 1:
        raise _Refused(f"{name} holds {len(series)} series ({len(headers)} images): name the folder of one of them")
    first = headers[0]
    seen: dict[str, Any] = {}
    for header, source in zip(headers, sources, strict=True):
        if number_of_frames(header) > 1:
            raise _Refused(f"{name} holds several files, {source} among them with several frames: name one file")
        for key in ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "Modality"):
            if header.get(key) != first.get(key):
                raise _Refused(f"{source} differs from {sources[0]} in {key}: they are no one volume")
        one, other = _directions(first, 0), _directions(header, 0)
        if (one is None) != (other is None) or (one is not None and np.abs(one - other).max() > _TOLERANCE):
            raise _Refused(f"{source} lies in another direction than {sources[0]}: they are no one volume")
        instance = str(header.get("SOPInstanceUID"))
        if instance in seen and header.get("SOPInstanceUID"):
            raise _Refused(f"{source} and {seen[instance]} are the same image: keep one of them")
        seen[instance] = source
    directions = _directions(first, 0)
    positions = [_position(header, 0) for header in headers]
    numbers = [(_numbers(header.get("InstanceNumber"), 1) or (0.0,))[0] for header in headers]
    along = [0.0] * len(headers)
    if directions is not None and all(position is not None for position in positions):
        along = [round(float(position @ np.cross(*directions)), 3) for position in positions]
    order = sorted(range(len(headers)), key=lambda i: (along[i], numbers[i], str(sources[i])))
    return [headers[i] for i in order], [sources[i] for i in order]


def _name_of(source: Path | bytes, name: str) -> str:
    return str(source) if isinstance(source, Path) else name


def _photometric(dataset: Any) -> str:
    return str(dataset.get("PhotometricInterpretation") or "")


def _code(value: Any) -> str | None:
    """A code string, if it is one: anything else might quote a person."""
    text = str(value or "").strip().upper()
    return text if 0 < len(text) <= 16 and all(c.isalnum() or c in "_ " for c in text) else None


def _numbers(value: Any, count: int | None) -> tuple[float, ...] | None:
    """Finite numbers of an element; `None` where it is missing or holds something else."""
    try:
        numbers = tuple(float(v) for v in (value if isinstance(value, Sequence) else [value]))
    except (TypeError, ValueError):
        return None
    return numbers if numbers and len(numbers) == (count or len(numbers)) and np.isfinite(numbers).all() else None


def _group(dataset: Any, frame: int, name: str) -> Any:
    """A functional group of a frame of an enhanced object: its own, or the shared one; {} where there is none."""
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for groups in (own[frame] if frame < len(own) else {}, shared[0] if len(shared) else {}):
        if group := groups.get(name):
            return group[0]
    return {}


def _measures(dataset: Any, frame: int) -> Any:
    return _group(dataset, frame, "PixelMeasuresSequence") or dataset


def _position(dataset: Any, frame: int) -> np.ndarray | None:
    place = _group(dataset, frame, "PlanePositionSequence") or dataset
    numbers = _numbers(place.get("ImagePositionPatient"), 3)
    return None if numbers is None or (place is dataset and frame) else np.array(numbers)


def _directions(dataset: Any, frame: int) -> np.ndarray | None:
    """(2, 3): unit vectors along a row and along a column, in DICOM's patient axes."""
    turn = _group(dataset, frame, "PlaneOrientationSequence") or dataset
    numbers = _numbers(turn.get("ImageOrientationPatient"), 6)
    if numbers is None:
        return None
    vectors = np.array(numbers).reshape(2, 3)
    unit = np.abs(vectors @ vectors.T - np.eye(2)).max() < 2 * _TOLERANCE
    return vectors if unit else None
