"""What kind of file this is, by its content: names and extensions are never trusted."""

import gzip
import zlib
from typing import BinaryIO


# A label map compresses a hundredfold, a bomb a thousandfold; what is small when unpacked may be anything.
MAX_GZIP_RATIO = 256
GZIP_RATIO_FREE_BYTES = 2**26

GZIP_MAGIC = b"\x1f\x8b"
_ARCHIVES = {
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"(\xb5/\xfd": "zstd",
}
_NIFTI_1, _NIFTI_2 = 348, 540
_HEAD = 1024


def recognise(file: BinaryIO, name: str) -> str:
    """The kind of an open file: "dicom", "nifti", "numpy", or "image" for whatever else (Pillow is to judge).

    Args:
        file: seekable, at its start, where it is left again.
        name: what to call it in an error.

    Raises:
        ValueError: for an empty file, an archive, or gzip around anything but NIfTI.
    """
    head = file.read(_HEAD)
    file.seek(0)
    if not head:
        raise ValueError(f"{name} is empty (0 bytes): a picture, a DICOM or a NIfTI file was expected")
    for magic, kind in _ARCHIVES.items():
        if head.startswith(magic):
            raise ValueError(f"{name} is an archive ({kind}): unpack it and name the file, or the folder of a series")
    if head.startswith(GZIP_MAGIC):
        try:
            head = gzip.GzipFile(fileobj=file, mode="rb").read(_HEAD)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{name} is a damaged or truncated gzip file ({error})") from error
        file.seek(0)
        if not _is_nifti(head):
            raise ValueError(f"{name} is gzip around something that is not NIfTI: unpack it first")
        return "nifti"
    if _is_dicom(head):
        return "dicom"
    if _is_nifti(head):
        return "nifti"
    return "numpy" if head.startswith(b"\x93NUMPY") else "image"


def check_gzip_ratio(packed: int, unpacked: int, name: str) -> None:
    """Hold the `unpacked` bytes that a header claims against the `packed` ones of the gzip file around it.

    Raises:
        ValueError: if it is a bomb, or claims more than it can hold; nothing was unpacked yet.
    """
    if unpacked > max(GZIP_RATIO_FREE_BYTES, MAX_GZIP_RATIO * packed):
        raise ValueError(
            f"{name} would unpack from {packed:,} to {unpacked:,} bytes: more than {MAX_GZIP_RATIO}-fold is refused. "
            "Unpack it yourself if you trust it"
        )


def _is_nifti(head: bytes) -> bool:
    size = head[:4]
    if any(size == _NIFTI_2.to_bytes(4, order) for order in ("little", "big")):
        return head[4:7] in (b"n+2", b"ni2")
    return any(size == _NIFTI_1.to_bytes(4, order) for order in ("little", "big")) and len(head) >= _NIFTI_1


def _is_dicom(head: bytes) -> bool:
    """By the prefix of PS3.10, or, for data sets saved without it, by a plausible first element of group 2 or 8."""
    if head[128:132] == b"DICM":
        return True
    group, element = head[:2], head[2:4]
    little = group in (b"\x02\x00", b"\x08\x00") and element[1:] == b"\x00"
    big = group in (b"\x00\x02", b"\x00\x08") and element[:1] == b"\x00"
    length = int.from_bytes(head[4:8], "little" if little else "big")
    return len(head) >= 8 and (little or big) and (head[4:6].isalpha() and head[4:6].isupper() or length < _HEAD)
