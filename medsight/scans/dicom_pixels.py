"""The pixels of a DICOM file as they are stored: decompressed, one frame at a time, or a reason why not."""

from typing import Any, NamedTuple

import numpy as np

from .dicom_file import RefusedError
from .dicom_header import number_of_frames


_READ_BY_ALL = (0xC0, 0xC1, 0xC2)  # kinds of JPEG, of 8 bits, that Pillow reads


def stored_pixels(dataset: Any, frame: int, name: str) -> np.ndarray:
    """(Rows, Columns), or (Rows, Columns, 3) with YBR as RGB.

    Args:
        dataset: with its pixels, as `read_whole` gives it.
        frame: from 0.
        name: what to call the frame in an error.

    Raises:
        RefusedError: the transfer syntax has no decoder, saying what to install, or the pixels are damaged.
    """
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder
    from pydicom.uid import RLELossless, UID_dictionary

    syntax = dataset.file_meta.TransferSyntaxUID
    called = syntax.name if syntax in UID_dictionary else "by a private method"
    size = int(dataset.Rows), int(dataset.Columns)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise RefusedError(
            f"{name} is compressed ({called}), and no decoder reads that: save it uncompressed, or as pictures"
        ) from None
    missing = next((entry for entry in decoder.missing_dependencies if entry.startswith("pylibjpeg")), "")
    install = " ".join(f'"{part}"' for part in missing.partition("requires ")[2].split(" and "))
    if not decoder.is_available:
        raise RefusedError(f"{name} is compressed ({called}), which needs another decoder: pip install {install}")
    stream = None
    if syntax.is_encapsulated and syntax != RLELossless:
        stream = read_codestream(get_frame(dataset.PixelData, frame, number_of_frames=number_of_frames(dataset)))
    if stream is not None and (stream.height, stream.width) != size:  # decoders allocate what the frame says
        raise RefusedError(f"{name} is damaged: its header and its compressed pixels claim different sizes")
    stored = int(dataset.get("BitsStored") or dataset.BitsAllocated)
    # pydicom takes the lowest bits for those that are stored, wherever the header puts them.
    lowest = int(dataset.get("HighBit") or stored - 1) + 1 - stored
    whole: dict[str, Any] = {"bits_stored": int(dataset.BitsAllocated), "pixel_representation": 0} if lowest else {}
    try:
        pixels, _ = decoder.as_array(dataset, index=frame, **whole)
    except RuntimeError:  # of all decoders that are there
        if missing and stream and stream.bits and (stream.kind not in _READ_BY_ALL or stream.bits != 8):
            raise RefusedError(
                f"{name} is compressed ({called}, {stream.bits} bits), which needs another decoder: "
                f"pip install {install}"
            ) from None
        raise
    if pixels.shape[:2] != size or pixels.ndim > 3:
        raise RefusedError(f"{name} is damaged: its pixels are not of the size its header claims")
    if lowest:
        pixels = pixels >> lowest & (2**stored - 1)
        if dataset.get("PixelRepresentation"):
            pixels = pixels.astype(np.int64) - (pixels >> (stored - 1) << stored).astype(np.int64)
    return pixels


class Codestream(NamedTuple):
    """What a JPEG, JPEG-LS or JPEG 2000 stream says of itself: for JPEG its kind, by the marker of its frame."""

    height: int
    width: int
    bits: int = 0
    kind: int = 0


def read_codestream(stream: bytes) -> Codestream | None:
    """The header of a stream; `None` where it has none."""
    siz = stream.find(b"\xff\x4f\xff\x51", 0, 4096)
    if siz >= 0:
        right, bottom, left, top = (int.from_bytes(stream[siz + at : siz + at + 4], "big") for at in (8, 12, 16, 20))
        return Codestream(bottom - top, right - left)
    at = 2
    while stream[:2] == b"\xff\xd8" and at + 9 <= len(stream):
        if stream[at] != 0xFF:
            at += 1
            continue
        marker = stream[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) or marker == 0xF7:
            height, width = (int.from_bytes(stream[at + there : at + there + 2], "big") for there in (5, 7))
            return Codestream(height, width, stream[at + 4], marker)
        bare = marker in (0x01, 0xFF) or 0xD0 <= marker <= 0xD8
        at += (1 if marker == 0xFF else 2) if bare else 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return None
