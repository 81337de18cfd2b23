"""A DICOM file from its bytes to a data set whose claims were held against them: before anything is allocated.

Whatever pydicom says about a file may quote what the file says about a person: no message of its own is passed on.
"""

import logging
import math
import os
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from processing_medsight.image_loading_medsight import MAX_IMAGE_PIXELS, open_source

from .dicom_header import code_of, number_of_frames, photometric_of


MAX_FRAMES = 2**17  # tiles of a whole slide
MAX_INFLATED_BYTES = 2**28  # of a deflated data set
_SAMPLES = {  # a pixel, by photometric interpretation
    **dict.fromkeys(("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"), 1),
    **dict.fromkeys(("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"), 3),
}
_DEFLATED = "1.2.840.10008.1.2.1.99"
NOT_IMAGES = {"SEG": "a segmentation", "RTDOSE": "a dose distribution"}  # though they hold pixels
_TALKERS = ("pydicom", "highdicom", "pylibjpeg", "openjpeg")  # loggers that may quote a header


class RefusedError(ValueError):
    """An error whose message is ours."""


class _Discretion(logging.Filter):
    """Drops what the threads that read a file log and warn of meanwhile, and nothing of any other thread."""

    def __init__(self) -> None:
        super().__init__()
        self._here, self._lock, self._readers = threading.local(), threading.Lock(), 0
        self._loggers: list[logging.Logger] = []

    def match(self, message: str) -> bool:
        """As the pattern of a filter of warnings: an `ignore` that holds in these threads alone."""
        return bool(getattr(self._here, "depth", 0))

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.match("")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        entry = ("ignore", self, Warning, None, 0)
        with self._lock:
            self._readers += 1
            if entry not in warnings.filters:
                warnings.filters.insert(0, entry)  # type: ignore[attr-defined]
            names = [name for name in list(logging.root.manager.loggerDict) if name.split(".")[0] in _TALKERS]
            self._loggers = [logging.getLogger(name) for name in {*_TALKERS, *names}]
            for logger in self._loggers:
                logger.addFilter(self)
        self._here.depth = getattr(self._here, "depth", 0) + 1
        try:
            yield
        finally:
            self._here.depth -= 1
            with self._lock:
                self._readers -= 1
                if not self._readers:
                    warnings.filters[:] = [kept for kept in warnings.filters if kept != entry]  # type: ignore[index]
                    for logger in self._loggers:
                        logger.removeFilter(self)


discreet = _Discretion()


@contextmanager
def guarded(name: str, problem: str) -> Iterator[None]:
    """Turn whatever pydicom and its kin raise into a ValueError, and keep them from writing about a person."""
    with discreet():
        try:
            yield
        except RefusedError:
            raise
        except Exception as error:
            raise RefusedError(f"{name}: {problem} ({type(error).__name__})") from None


def read_header(source: Path | bytes, name: str, segmentation: bool = False) -> Any:
    """A data set without its pixels, whose sizes were held against the bytes that are there.

    Args:
        segmentation: whether a segmentation is expected, and not an image.

    Raises:
        ValueError: for a damaged file, one that is no image, or sizes that are absurd.
    """
    import_pydicom(name)
    import pydicom

    with guarded(name, "it is damaged: its DICOM header cannot be read"), _stream(source, name) as file:
        dataset = pydicom.dcmread(file, stop_before_pixels=True, force=True)
        here = file.tell()
        element = 8 if dataset.original_encoding[0] else 12  # tag, representation and length of the pixels
        length = file.seek(0, os.SEEK_END) - here - element
        _set_transfer_syntax(dataset)
        if not (segmentation and dataset.get("Modality") == "SEG"):
            _check_is_image(dataset, length, name)
        _check_kind(dataset, name)
        _check_sizes(dataset, length, name)
        return dataset


def read_tags(source: Path, name: str, tags: list[str] | None = None) -> Any:
    """A data set without its pixels, whatever it is of; of these elements alone, where they are named.

    Raises:
        ValueError: for a damaged file.
    """
    import_pydicom(name)
    import pydicom

    with guarded(name, "it is damaged: its DICOM header cannot be read"), _stream(source, name) as file:
        return pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=tags)


def import_pydicom(name: str) -> None:
    """Raises a ValueError that says what to install, where there is no pydicom."""
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise ValueError(f'{name} is DICOM, which needs pydicom: pip install "medsight[medical]"') from error


def read_whole(source: Path | bytes, name: str) -> Any:
    import pydicom

    with _stream(source, name) as file:
        dataset = pydicom.dcmread(file, force=True)
    _set_transfer_syntax(dataset)
    _index_frames(dataset)
    return dataset


@contextmanager
def _stream(source: Path | bytes, name: str) -> Iterator[BinaryIO]:
    """The file as pydicom may read it; one that was deflated as a whole comes inflated, up to a limit."""
    from pydicom.filereader import read_dataset

    with open_source(source) as file:
        file.seek(132 if file.read(132)[128:] == b"DICM" else 0)
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
            raise RefusedError(f"{name} inflates to more than {MAX_INFLATED_BYTES:,} bytes")
        if not unpack.eof:
            raise RefusedError(f"{name} is truncated")
        yield BytesIO(inflated)


def _set_transfer_syntax(dataset: Any) -> None:
    """Say how a data set without a transfer syntax is encoded, or one that was inflated."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    implicit, little = dataset.original_encoding
    dataset.ensure_file_meta()
    if not dataset.file_meta.get("TransferSyntaxUID"):
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _check_is_image(dataset: Any, length: int, name: str) -> None:
    from pydicom.uid import UID_dictionary

    kind = NOT_IMAGES.get(code_of(dataset.get("Modality")) or "")
    if kind is None and "DirectoryRecordSequence" in dataset:
        kind = "a directory of other files"
    if kind is None and (length <= 0 or not all(key in dataset for key in ("Rows", "Columns", "BitsAllocated"))):
        kind = "an object without pixels"
    if kind is not None:
        known = UID_dictionary.get(str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")))
        what = f" ({known[0].removesuffix(' Storage')})" if known else ""
        raise RefusedError(f"{name} is no image but {kind}{what}")


def _check_kind(dataset: Any, name: str) -> None:
    """Refuse a combination of colours and depths that is not read, or that pydicom would read as another."""
    from pydicom.uid import JPEG2000TransferSyntaxes, RLELossless

    syntax = dataset.file_meta.TransferSyntaxUID
    photometric, samples = photometric_of(dataset), int(dataset.get("SamplesPerPixel") or 1)
    allocated, signed = int(dataset.BitsAllocated), bool(dataset.get("PixelRepresentation"))
    stored = int(dataset.get("BitsStored") or allocated)
    high = int(dataset.get("HighBit") or stored - 1)
    at_the_bottom = high == stored - 1
    read = (
        _SAMPLES.get(photometric) == samples
        and (allocated in (1, 8, 16, 32) if samples == 1 else allocated in (8, 16, 32) and not signed)
        and (photometric != "PALETTE COLOR" or allocated <= 16)
        and 1 <= stored <= high + 1 <= allocated
        and (at_the_bottom or syntax.is_private or not syntax.is_encapsulated or syntax == RLELossless)
        and (photometric not in ("YBR_ICT", "YBR_RCT") or syntax in JPEG2000TransferSyntaxes)
        and (photometric not in ("YBR_FULL", "YBR_FULL_422") or (stored == 8 and at_the_bottom))
    )
    if not read:
        colours = code_of(photometric) or "unknown colours"
        raise RefusedError(
            f"{name} has pixels of a kind that is not read: {colours}, {samples} x {allocated} bits, "
            f"{'signed, ' if signed else ''}{stored} of them used up to bit {high}: save it in grey or RGB of 8 bits"
        )


def _check_sizes(dataset: Any, length: int, name: str) -> None:
    """Rows x columns x frames against the bytes that follow the header."""
    from pydicom.uid import UID

    rows, columns, frames = int(dataset.Rows), int(dataset.Columns), number_of_frames(dataset)
    samples, bits = int(dataset.get("SamplesPerPixel") or 1), int(dataset.BitsAllocated)
    if min(rows, columns, frames) < 1:
        raise RefusedError(f"{name} has a damaged header: {frames} frames of {rows} x {columns} pixels")
    if rows * columns > MAX_IMAGE_PIXELS or frames > MAX_FRAMES:
        raise RefusedError(
            f"{name} claims {frames:,} frames of {rows:,} x {columns:,} pixels: at most {MAX_FRAMES:,} of "
            f"{MAX_IMAGE_PIXELS:,} in total are read"
        )
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    packed = syntax.is_private or syntax.is_encapsulated
    share = 2 / 3 if photometric_of(dataset) == "YBR_FULL_422" else 1
    needed = 8 * frames if packed else math.ceil(rows * columns * samples * frames * bits * share / 8)
    if needed > length:
        raise RefusedError(
            f"{name} is truncated: its header claims {frames:,} frames of {rows:,} x {columns:,} pixels, which do not "
            f"fit into the {max(length, 0):,} bytes that follow it"
        )


def _index_frames(dataset: Any) -> None:
    """Give compressed frames a table of offsets: without one, pydicom walks through all fragments at each frame."""
    from pydicom.encaps import encapsulate, generate_frames, parse_basic_offsets

    frames = number_of_frames(dataset)
    if frames == 1 or not dataset.file_meta.TransferSyntaxUID.is_encapsulated or "ExtendedOffsetTable" in dataset:
        return
    if not parse_basic_offsets(BytesIO(dataset.PixelData)):
        streams = generate_frames(dataset.PixelData, number_of_frames=frames)
        dataset.PixelData = encapsulate(list(islice(streams, frames)))
