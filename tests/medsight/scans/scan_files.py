"""Small scans of every kind for tests: drawn here, or shipped by pydicom."""

import gzip
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


SHAPE = (5, 6, 7)
STORED = np.arange(0, 4000, 100, dtype=np.uint16).reshape(5, 8)  # (rows, columns) of a DICOM file


def picture_bytes(kind: str, mode: str = "RGB", size: tuple[int, int] = (12, 9), **options: object) -> bytes:
    """A small picture file; size is (width, height)."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff_bytes(pages: list[Image.Image], **options: object) -> bytes:
    file = BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:], **options)
    return file.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with next to no pixels in it."""
    content = bytearray(picture_bytes("PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def nifti_bytes(
    voxels: np.ndarray, affine: np.ndarray | None = None, packed: bool = False, second: bool = False
) -> bytes:
    import nibabel

    kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    content = kind(voxels, np.eye(4) if affine is None else affine).to_bytes()
    return gzip.compress(content, mtime=0) if packed else content


def npy_bytes(array: np.ndarray) -> bytes:
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


def ct_volume() -> np.ndarray:
    """(5, 6, 7) int16 in Hounsfield units: air with a body in it, each voxel told from the others."""
    voxels = np.full(SHAPE, -1000, np.int16)
    voxels[1:4, 1:5, 1:6] = np.random.default_rng(0).integers(-150, 230, (3, 4, 5))
    return voxels


def dicom_dataset(pixels: np.ndarray, **elements: object) -> Any:
    """A data set around (rows, columns), (frames, rows, columns) or (rows, columns, 3) pixels."""
    import pydicom
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.SeriesInstanceUID = "1.2.3"
    dataset.PatientName, dataset.PatientID = "Doe^Secret", "Secret-4711"
    colour = pixels.ndim == 3 and pixels.shape[2] == 3
    dataset.set_pixel_data(np.ascontiguousarray(pixels), "RGB" if colour else "MONOCHROME2", 8 * pixels.itemsize)
    for key, value in {"Modality": "CT", "RescaleIntercept": 0, "RescaleSlope": 1, **elements}.items():
        setattr(dataset, key, value)
        if value is None:
            delattr(dataset, key)
    return dataset


def lookup_table(factor: int, count: int, first: int = 0) -> Any:
    """A modality or VOI lookup table: `count` values of 16 bits, `factor` times as large as what is looked up."""
    import pydicom

    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [count, first, 16], "US"
    table.add_new("LUTData", "US", list(range(0, factor * count, factor)))
    return table


def functional_group(sequence: str, **elements: object) -> Any:
    """The functional groups of a frame of an enhanced object: one sequence with one item."""
    import pydicom

    groups, item = pydicom.Dataset(), pydicom.Dataset()
    for key, value in elements.items():
        setattr(item, key, value)
    setattr(groups, sequence, [item])
    return groups


def dicom_bytes(dataset: Any) -> bytes:
    file = BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def write_series(folder: Path, volume: np.ndarray, names: list[str], **elements: object) -> None:
    """A CT series of (slices, rows, columns), its files named so; slices 2 mm apart, pixels 1.5 x 0.5 mm."""
    folder.mkdir(exist_ok=True)
    for i, (pixels, name) in enumerate(zip(volume, names, strict=True)):
        place = {"ImagePositionPatient": [-10, -20, 30 + 2 * i], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        spacing = {"PixelSpacing": [1.5, 0.5], "SliceThickness": 2, "InstanceNumber": i + 1}
        (folder / name).write_bytes(dicom_bytes(dicom_dataset(pixels, **place, **spacing, **elements)))


def shipped_dicoms() -> Iterator[tuple[str, Path]]:
    """Every DICOM that pydicom ships for tests: name and path."""
    import pydicom

    root = Path(pydicom.__file__).parent / "data"
    for path in sorted((root / "test_files").rglob("*")):
        if path.is_file() and path.suffix in (".dcm", ".gz", "") and path.name != "README":
            yield path.relative_to(root / "test_files").as_posix(), path


def soft_tissue(values: np.ndarray) -> np.ndarray:
    """Grey levels of values in Hounsfield units, by the window of training."""
    return ((values.astype(float) + 160) / 400 * 255).clip(0, 255)


def on_grid(image: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
    """The pixels of a slice from the picture that shows it; exact where sides are drawn out by an odd factor."""
    return np.asarray(image.resize(shape[1::-1], Image.Resampling.NEAREST))


def shows(image: Image.Image, levels: np.ndarray) -> bool:
    """Whether a picture has these grey levels, rounded, on the slice's own pixels."""
    return bool(np.abs(on_grid(image, levels.shape) - levels).max() <= 0.51)
