"""Files that are no scan, or claim to be more than they are: refused by name, before anything is allocated."""

import gzip
import logging
import struct
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from medsight.scans import dicom_file, open_scan
from tests.medsight.scans.scan_files import (
    STORED,
    ct_volume,
    dicom_bytes,
    dicom_dataset,
    lookup_table,
    nifti_bytes,
    picture_bytes,
    png_claiming,
    shipped_dicoms,
    write_series,
)


nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")


def nifti_claiming(field: str, value: object) -> bytes:
    content = nifti_bytes(ct_volume())
    header = nibabel.Nifti1Header(content[:348], check=False)
    header[field] = value
    return header.binaryblock + content[348:]


def npy_claiming(shape: tuple, kind: str = "<u2") -> bytes:
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(64)


def deflated(megabytes: int) -> bytes:
    """A data set deflated as a whole, of which most is padding."""
    dataset = dicom_dataset(STORED)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.add_new(0xFFFCFFFC, "OB", bytes(megabytes * 2**20))
    return dicom_bytes(dataset)


HOSTILE = {
    "nifti of 10^12 voxels": (lambda: nifti_claiming("dim", [3, 10000, 10000, 10000, 1, 1, 1, 1]), "10,000 x 10,000"),
    "nifti of 10^9 voxels": (lambda: nifti_claiming("dim", [3, 1000, 1000, 1000, 1, 1, 1, 1]), "truncated"),
    "gzip bomb": (lambda: nifti_bytes(np.zeros((512, 512, 300), np.uint8), packed=True), "would unpack from"),
    "nifti with a negative axis": (lambda: nifti_claiming("dim", [3, 5, -5, 7, 1, 1, 1, 1]), "damaged header"),
    "nifti whose voxels begin nowhere": (lambda: nifti_claiming("vox_offset", np.nan), "damaged header"),
    "nifti of vectors": (lambda: nifti_claiming("dim", [5, 5, 6, 1, 1, 7, 1, 1]), "several values a voxel"),
    "nifti of labels": (lambda: nifti_claiming("intent_code", 1002), "label map"),
    "nifti of complex numbers": (lambda: nifti_bytes(ct_volume().astype(np.complex64)), "complex"),
    "half of a nifti.gz": (lambda: nifti_bytes(ct_volume(), packed=True)[:200], "truncated"),
    "header of a pair": (lambda: nifti_claiming("magic", b"ni1"), "another file"),
    "analyze": (lambda: nifti_claiming("magic", b""), "Analyze"),
    "dicom of more rows than pixels": (lambda: dicom_bytes(dicom_dataset(STORED, Rows=60000)), "truncated"),
    "dicom of more frames than pixels": (lambda: dicom_bytes(dicom_dataset(STORED, NumberOfFrames=99)), "99 frames"),
    "dicom of giant frames": (lambda: dicom_bytes(dicom_dataset(STORED, Rows=65535, Columns=65535)), "at most"),
    "dicom without rows": (lambda: dicom_bytes(dicom_dataset(STORED, Rows=None)), "no image"),
    "dicom of 13 bits": (lambda: dicom_bytes(dicom_dataset(STORED, BitsAllocated=13)), "13 bits"),
    "deflate bomb": (lambda: deflated(3), "inflates to more than"),
    "segmentation": (lambda: dicom_bytes(dicom_dataset(STORED, Modality="SEG")), "segmentation"),
    "zip": (lambda: b"PK\x03\x04" + bytes(60), "archive"),
    "gzip of text": (lambda: gzip.compress(b"no image"), "not NIfTI"),
    "giant png": (lambda: png_claiming(30000, 30000), "pixels"),
    "giant npy": (lambda: npy_claiming((10**6, 10**6)), "claims 2,000,000,000,000 bytes"),
    "npy of objects": (lambda: npy_claiming((1,), "|O"), "numbers"),
    "nothing": (lambda: b"", "empty"),
    "text": (lambda: b"this is no image", "not an image"),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_file_is_refused_before_anything_is_allocated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, message = HOSTILE[name]
    content = make()
    empty = np.empty
    monkeypatch.setattr(dicom_file, "MAX_INFLATED_BYTES", 2**21)
    monkeypatch.setattr(np, "empty", lambda shape, *a, **k: empty(shape, *a, **k) if np.prod(shape) < 2**20 else 1 / 0)
    with pytest.raises(ValueError, match=message) as error:
        open_scan(content, "upload").slice_image(0)
    assert "upload" in str(error.value)


def test_a_compressed_frame_that_is_larger_than_its_header_says_is_refused() -> None:
    photo = picture_bytes("JPEG", "L", size=(8, 5))
    at = photo.index(b"\xff\xc0")
    photo = photo[: at + 5] + struct.pack(">HH", 60000, 60000) + photo[at + 9 :]
    dataset = dicom_dataset(np.zeros((5, 8), np.uint8), Modality="US")
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.PixelData = pydicom.encaps.encapsulate([photo])
    with pytest.raises(ValueError, match="claim different sizes"):
        open_scan(dicom_bytes(dataset)).slice_image(0)


def compressed(syntax: str, stream: bytes, **elements: object) -> bytes:
    dataset = dicom_dataset(np.zeros((9, 12), np.uint8), Modality="US", **elements)
    dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    dataset.PixelData = pydicom.encaps.encapsulate([stream])
    return dicom_bytes(dataset)


GREY_JPEG = picture_bytes("JPEG", "L")
MISREAD = "of a kind that is not read"
UNDECODABLE = {  # by what is wrong, and what the error says of it
    "damaged": (lambda: compressed("JPEGBaseline8Bit", GREY_JPEG[:60] + bytes(9) + GREY_JPEG[90:]), "is damaged"),
    "no decoder": (lambda: compressed("MPEG2MPML", bytes(64)), r"MPEG2 .* no decoder reads that"),
    "16 bits of luminance": (
        lambda: dicom_bytes(dicom_dataset(np.zeros((5, 8, 3), np.uint16), PhotometricInterpretation="YBR_FULL")),
        f"{MISREAD}: YBR_FULL, 3 x 16 bits",
    ),
    "partial range": (
        lambda: dicom_bytes(dicom_dataset(np.zeros((5, 8, 3), np.uint8), PhotometricInterpretation="YBR_PARTIAL_422")),
        MISREAD,
    ),
    "colours of one sample": (lambda: dicom_bytes(dicom_dataset(STORED, PhotometricInterpretation="RGB")), MISREAD),
    "bits above those allocated": (lambda: dicom_bytes(dicom_dataset(STORED, HighBit=16)), f"{MISREAD}.*bit 16"),
    "high bits in a JPEG": (lambda: compressed("JPEGBaseline8Bit", GREY_JPEG, BitsStored=7), MISREAD),
    "a table that is cut": (
        lambda: dicom_bytes(dicom_dataset(STORED, Modality="DX", VOILUTSequence=[short_table()])),
        "LUTData should have 4,000 entries",
    ),
    "a slope of nothing": (lambda: dicom_bytes(dicom_dataset(STORED, RescaleSlope=0)), "slope"),
}


def short_table() -> object:
    table = lookup_table(1, 3000)
    table.LUTDescriptor = [4000, 0, 16]
    return table


@pytest.mark.parametrize("name", list(UNDECODABLE))
def test_an_error_says_whether_a_file_is_damaged_or_its_kind_is_not_read(name: str) -> None:
    make, message = UNDECODABLE[name]
    with pytest.raises(ValueError, match=f"^upload.*{message}") as error:
        open_scan(make(), "upload").slice_image(0)
    assert ("damaged" in str(error.value)) == (name in ("damaged", "a table that is cut", "a slope of nothing"))


@pytest.mark.parametrize("installed", [False, True])
def test_a_missing_decoder_is_named_with_what_to_install(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.pixels import get_decoder

    decoder = get_decoder(pydicom.uid.JPEGExtended12Bit if installed else pydicom.uid.JPEGLSLossless)
    left = {"pillow": decoder._available["pillow"]} if installed else {}  # which reads no 12 bits
    monkeypatch.setattr(decoder, "_available", left)
    monkeypatch.setattr(decoder, "_unavailable", {"pylibjpeg": ("pylibjpeg>=2.0", "pylibjpeg-libjpeg>=2.1")})
    files = dict(shipped_dicoms())
    path = files["JPGExtended.dcm" if installed else "MR_small_jpeg_ls_lossless.dcm"]
    with pytest.raises(ValueError, match='compressed .JPEG.*pip install "pylibjpeg>=2.0" "pylibjpeg-libjpeg>=2.1"'):
        open_scan(path).slice_image(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SeriesInstanceUID": "9.9"}, "holds 2 series"),
        ({"Rows": 4}, "differs from .* in Rows"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, 1]}, "another direction"),
        ({"SOPInstanceUID": "same"}, "are the same image"),
        ({"Modality": "SEG"}, "b is no image but a segmentation"),
        ({"cut": True}, "b is truncated"),
    ],
)
def test_files_that_make_no_series_are_refused_by_name(change: dict, message: str, tmp_path: Path) -> None:
    write_series(tmp_path, np.moveaxis(ct_volume(), 2, 0)[:3], list("abc"))
    dataset = pydicom.dcmread(tmp_path / "b")
    if "cut" in change:
        (tmp_path / "b").write_bytes((tmp_path / "b").read_bytes()[:-3])
    else:
        for key, value in change.items():
            setattr(dataset, key, pydicom.dcmread(tmp_path / "a").SOPInstanceUID if value == "same" else value)
        (tmp_path / "b").write_bytes(dicom_bytes(dataset))
    with pytest.raises(ValueError, match=message):
        open_scan(tmp_path)


def test_errors_call_files_by_the_name_that_was_given(tmp_path: Path) -> None:
    write_series(tmp_path, np.moveaxis(ct_volume(), 2, 0)[:3], list("abc"))
    whole = (tmp_path / "b").read_bytes()
    for content in (whole[:-3], whole[:300]):
        (tmp_path / "b").write_bytes(content)
        for source, called in ((tmp_path / "b", "upload"), (tmp_path, "upload/b")):
            with pytest.raises(ValueError, match=rf"^{called}\b") as error:
                open_scan(source, "upload")
            assert str(tmp_path) not in str(error.value)
    (tmp_path / "b").write_bytes(whole)
    scan = open_scan(tmp_path, "upload")
    (tmp_path / "b").write_bytes(whole[:-3])  # after its header was read
    with pytest.raises(ValueError, match=r"^upload/b\b") as error:
        scan.slice_image(1)
    assert str(tmp_path) not in str(error.value)


def test_a_folder_of_other_things_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    for source, message in ((tmp_path, "without a DICOM file"), (tmp_path / "missing.dcm", "no such file")):
        with pytest.raises(ValueError, match=message):
            open_scan(source)


def test_no_message_names_the_patient(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    good = dicom_bytes(dicom_dataset(STORED))
    said = []
    with caplog.at_level(logging.DEBUG):
        for at in range(132, len(good), 3):
            try:
                scan = open_scan(good[:at] + b"\xff\xff" + good[at + 2 :], "upload")
                said.append(repr(scan))
                scan.slice_image(0)
            except ValueError as error:
                said.append(f"{error} {error.__cause__}")
    said += [caplog.text, *(str(warning.message) for warning in recwarn)]
    assert len(said) > 100 and not any("Doe" in text or "4711" in text for text in said)


def test_missing_readers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"pydicom": dicom_bytes(dicom_dataset(STORED)), "nibabel": nifti_bytes(ct_volume())}
    for library, content in contents.items():
        with monkeypatch.context() as without:
            without.setitem(sys.modules, library, None)
            with pytest.raises(ValueError, match=rf'needs {library}: pip install "medsight\[medical\]"'):
                open_scan(content)
