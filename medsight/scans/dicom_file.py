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
_DEFLATED = "1.2.840.10008.1.2.1.99"
_NOT_IMAGES = {"SEG": "a segmentation", "RTDOSE": "a dose distribution"}  # though they hold pixels
_READING = threading.RLock()  # warnings and log levels are the whole process's


class RefusedError(ValueError):
    """An error whose message is ours."""


@contextmanager
def guarded(name: str, problem: str) -> Iterator[None]:
    """Turn whatever pydicom and its decoders raise into a ValueError, and keep them from writing about a person."""
    logger = logging.getLogger("pydicom")
    with _READING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level, logger.level = logger.level, logging.CRITICAL + 1
        try:
            yield
        except RefusedError:
            raise
        except Exception as error:
            raise RefusedError(f"{name}: {problem} ({type(error).__name__})") from None
        finally:
            logger.level = level


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

    kind = _NOT_IMAGES.get(code_of(dataset.get("Modality")) or "")
    if kind is None and "DirectoryRecordSequence" in dataset:
        kind = "a directory of other files"
    if kind is None and (length <= 0 or not all(key in dataset for key in ("Rows", "Columns", "BitsAllocated"))):
        kind = "an object without pixels"
    if kind is not None:
        known = UID_dictionary.get(str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")))
        what = f" ({known[0].removesuffix(' Storage')})" if known else ""
        raise RefusedError(f"{name} is no image but {kind}{what}")


def _check_sizes(dataset: Any, length: int, name: str) -> None:
    """Rows x columns x frames against the bytes that follow the header."""
    from pydicom.uid import UID

    rows, columns, frames = int(dataset.Rows), int(dataset.Columns), number_of_frames(dataset)
    samples, bits = int(dataset.get("SamplesPerPixel") or 1), int(dataset.BitsAllocated)
    if min(rows, columns, frames) < 1 or samples not in (1, 3) or bits not in (1, 8, 16, 32, 64):
        raise RefusedError(
            f"{name} has a damaged header: {frames} frames of {rows} x {columns} pixels of {samples} x {bits} bits"
        )
    if rows * columns > MAX_IMAGE_PIXELS or frames > MAX_FRAMES:
        raise RefusedError(
            f"{name} claims {frames:,} frames of {rows:,} x {columns:,} pixels: at most {MAX_FRAMES:,} of "
            f"{MAX_IMAGE_PIXELS:,} in total are read"
        )
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    packed = syntax.is_private or syntax.is_encapsulated
    share = 2 / 3 if photometric_of(dataset) in ("YBR_FULL_422", "YBR_PARTIAL_422") else 1
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


def check_codestream(dataset: Any, frame: int, name: str) -> None:
    """Hold a compressed frame's own size against the header's: decoders allocate what the frame says."""
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated or syntax == RLELossless:
        return
    size = codestream_size(get_frame(dataset.PixelData, frame, number_of_frames=number_of_frames(dataset)))
    if size is not None and size != (int(dataset.Rows), int(dataset.Columns)):
        raise RefusedError(f"{name} is damaged: its header and its compressed pixels claim different sizes")


def lacks_pylibjpeg(syntax: Any) -> bool:
    """Whether a package that is not installed might decode a transfer syntax."""
    from pydicom.pixels import get_decoder

    return any(entry.startswith("pylibjpeg") for entry in get_decoder(syntax).missing_dependencies)


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
