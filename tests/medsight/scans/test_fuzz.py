"""Mutated files: a picture of the right size or a ValueError, within seconds, and nothing else."""

import faulthandler
import gzip
import time
import warnings
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from medsight.scans import open_scan
from tests.medsight.scans.scan_files import (
    ct_volume,
    dicom_bytes,
    dicom_dataset,
    nifti_bytes,
    npy_bytes,
    picture_bytes,
    shipped_dicoms,
)


pytest.importorskip("pydicom")
pytest.importorskip("nibabel")
tifffile = pytest.importorskip("tifffile")

SLOWEST = 10  # seconds a file
LARGEST_SEED = 40_000  # bytes
HEADER = 400
NIFTI_FIELDS = (*range(40, 56, 2), 70, 72, *range(80, 96, 4), 108, 112, 116, 123, 252, 254, *range(280, 328, 4))
EXTREMES = (b"\xff", b"\0", b"\x01", b"\x7f")


def seeds() -> list[tuple[str, bytes]]:
    """Small files of every kind, and the small ones that pydicom ships."""
    volume = ct_volume()
    found = {
        "nifti": nifti_bytes(volume),
        "nifti-2": nifti_bytes(volume.astype(np.float32), second=True),
        "nifti.gz": nifti_bytes(volume, packed=True),
        "png": picture_bytes("PNG"),
        "png16": picture_bytes("PNG", "I;16"),
        "jpeg": picture_bytes("JPEG"),
        "jpeg progressive": picture_bytes("JPEG", "L", progressive=True),
        "tiff": picture_bytes("TIFF"),
        "tiff16": picture_bytes("TIFF", "I;16", compression="tiff_deflate"),
        "tiff lzw": picture_bytes("TIFF", compression="tiff_lzw"),
        "tiff pages": picture_bytes("TIFF", save_all=True, append_images=[Image.new("RGB", (12, 9), "red")] * 3),
        "tiff of floats": deep_tiff(volume.astype(float), compression="zlib"),
        "tiff in planes": deep_tiff(volume[:3].astype(np.uint16), photometric="rgb", planarconfig="separate"),
        "npy": npy_bytes(volume),
        "dicom": dicom_bytes(dicom_dataset(volume[2])),
        "dicom frames": dicom_bytes(dicom_dataset(volume)),
    }
    shipped = {name: path.read_bytes() for name, path in shipped_dicoms() if path.stat().st_size < LARGEST_SEED}
    return [*found.items(), *shipped.items()]


def deep_tiff(pixels: np.ndarray, **options: object) -> bytes:
    """A TIFF that Pillow does not read."""
    file = BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def fields(content: bytes) -> list[int]:
    """Where the header has numbers: the fields of NIfTI, or DICOM's group 28, which describes pixels."""
    if content[:4] == b"\x5c\x01\0\0":
        return list(NIFTI_FIELDS)
    return [at + 8 for at in range(len(content) - 10) if content[at : at + 2] == b"\x28\0"] or [0]


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """The file with a field, bits or bytes of it changed, a part cut out or doubled, or its end cut off."""
    if content[:2] == b"\x1f\x8b" and rng.integers(2):
        return gzip.compress(mutated(gzip.decompress(content), rng))
    changed = bytearray(content)
    kind = rng.choice(["end", "part", "header", "anywhere", "field"])
    first, last = sorted(rng.integers(0, len(changed), 2))
    if kind == "end":
        del changed[last:]
    elif kind == "part":
        changed[first:last] = b"" if rng.integers(2) else changed[first:last] * 2
    else:
        places = {"header": range(min(HEADER, len(changed))), "anywhere": range(len(changed))}.get(kind)
        for at in rng.choice(places or fields(content), rng.integers(1, 5)):
            size = int(rng.choice([1, 2, 4, 8]))
            flipped = bytes([changed[at] ^ 1 << int(rng.integers(8))])
            other = [flipped, rng.bytes(size), EXTREMES[rng.integers(4)] * size][rng.integers(3)]
            changed[at : at + len(other)] = other
    return bytes(changed)


def read_all(content: bytes) -> None:
    scan = open_scan(content, "upload")
    for index in sorted({0, scan.num_slices // 2, scan.num_slices - 1}):
        image = scan.slice_image(index)
        assert image.size == scan.picture_size and image.mode in ("L", "RGB")
    mask = np.ones((scan.height, scan.width), dtype=bool)
    if scan.num_slices * mask.size < 2**22:
        assert scan.to_source({scan.num_slices - 1: mask}).sum() == mask.sum()


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_mutated_file_is_read_at_its_size_or_refused(count: int) -> None:
    faulthandler.enable()
    read, known = 0, seeds()
    for i in range(count):
        kind, seed = known[i % len(known)]
        name, content = f"{kind}, mutation {i}", mutated(seed, np.random.default_rng(i))
        faulthandler.dump_traceback_later(6 * SLOWEST, exit=True)  # a hang in a decoder cannot be raised out of
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_all(content)
            read += 1
        except ValueError as error:
            assert "upload" in str(error) and "Doe" not in str(error) and "Secret" not in str(error), name
        except BaseException as error:
            raise AssertionError(f"{name}: {type(error).__name__} came out") from error
        assert time.perf_counter() - start < SLOWEST, name
    faulthandler.cancel_dump_traceback_later()
    assert 0.1 * count < read < 0.9 * count
