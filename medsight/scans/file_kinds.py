"""What kind of file this is, by its content: names and extensions are never trusted."""

import gzip
import zlib
from pathlib import Path

from processing_medsight.image_loading_medsight import HEAD_BYTES, format_of, head_of, open_source


_ARCHIVES = {
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"(\xb5/\xfd": "zstd",
}


def recognise(source: Path | bytes, name: str) -> str:
    """The kind of a file: "dicom", "nifti", "npy", or "image" for whatever else (Pillow is to judge).

    Args:
        name: what to call it in an error.

    Raises:
        ValueError: for a file that is empty or cannot be read, an archive, or gzip around anything but NIfTI.
    """
    head = head_of(source, name)
    for magic, kind in _ARCHIVES.items():
        if head.startswith(magic):
            raise ValueError(f"{name} is an archive ({kind}): unpack it and name the file, or the folder of a series")
    found = format_of(head)
    if found == "gzip":
        try:
            with open_source(source) as file:
                unpacked = gzip.GzipFile(fileobj=file, mode="rb").read(HEAD_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{name} is a damaged or truncated gzip file ({error})") from error
        if format_of(unpacked) != "NIfTI":
            raise ValueError(f"{name} is gzip around something that is not NIfTI: unpack it first")
        return "nifti"
    return "image" if found is None else found.lower()
