"""What all scans have in common: kinds, windows, the choice of slices, masks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medsight.scans import open_scan
from tests.medsight.scans.scan_files import (
    STORED,
    ct_volume,
    dicom_bytes,
    dicom_dataset,
    nifti_bytes,
    npy_bytes,
    picture_bytes,
)


nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")


CONTENTS = {
    "dicom": dicom_bytes(dicom_dataset(STORED)),
    "nifti": nifti_bytes(ct_volume()),
    "nifti.gz": nifti_bytes(ct_volume(), packed=True),
    "nifti-2": nifti_bytes(ct_volume(), second=True),
    "png": picture_bytes("PNG", "I;16"),
    "npy": npy_bytes(STORED),
    "jpeg": picture_bytes("JPEG"),
    "tiff": picture_bytes("TIFF"),
}


@pytest.mark.parametrize("kind", list(CONTENTS))
def test_a_kind_is_recognised_by_content_in_a_file_of_any_name_and_in_bytes(kind: str, tmp_path: Path) -> None:
    content = CONTENTS[kind]
    (tmp_path / "file.png").write_bytes(content)
    scans = [open_scan(tmp_path / "file.png"), open_scan(str(tmp_path / "file.png")), open_scan(content, "upload")]
    expected = "dicom" if kind == "dicom" else "nifti" if kind.startswith("nifti") else "image"
    assert {scan.kind for scan in scans} == {expected}
    shown = [np.asarray(scan.slice_image(0)) for scan in scans]
    assert np.array_equal(shown[0], shown[1]) and np.array_equal(shown[0], shown[2])
    assert scans[0].files == (tmp_path / "file.png",) and scans[2].files == () and scans[2].name == "upload"


@pytest.mark.parametrize(
    ("window", "low", "high"),
    [
        ((1000, 500), 750, 1250),
        ("abdomen", -150, 250),
        ("lung", -1350, 150),
        ("bone", -500, 1300),
        ("brain", 0, 80),
        ("soft tissue", -160, 240),
    ],
)
def test_a_window_of_the_call_is_that_of_dicom_nifti_and_arrays(window: object, low: int, high: int) -> None:
    values = np.linspace(-1600, 1500, 40).astype(np.int16).reshape(5, 8)
    values[2] = np.linspace(-5, 90, 8)
    shown = ((values - low) / (high - low) * 255).clip(0, 255).round()
    sources = {
        "dicom": dicom_bytes(dicom_dataset(values)),
        "nifti": nifti_bytes(values[::-1, ::-1].T[:, :, None]),
        "array": values,
        "tensor": torch.from_numpy(values),
        "picture": Image.fromarray(values.astype(np.int32)),
    }
    for name, source in sources.items():
        assert np.abs(np.asarray(open_scan(source).slice_image(0, window)) - shown).max() <= 1, name


def test_a_window_that_makes_no_sense_is_refused() -> None:
    wrong = {"liver": "abdomen, lung, bone, brain, soft tissue, file, or", (1, 0): "width above 0"}
    for window, message in {**wrong, (1, 2, 3): "centre, width", 7: "centre, width"}.items():
        for content in (nifti_bytes(ct_volume()), dicom_bytes(dicom_dataset(STORED)), STORED):
            with pytest.raises(ValueError, match=message):
                open_scan(content).slice_image(0, window)


@pytest.mark.parametrize("window", [(1, 2), "lung", "file"])
def test_a_window_is_refused_where_there_are_no_grey_levels_to_choose(window: object) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
    voxels = np.ascontiguousarray(colours).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    pages = [Image.fromarray(page) for page in colours]
    sources = {
        "colour": picture_bytes("PNG"),
        "8 bits": picture_bytes("PNG", "L"),
        "array": colours[0],
        "dicom": dicom_bytes(dicom_dataset(colours[0], Modality="US", WindowCenter=9, WindowWidth=8)),
        "nifti": nifti_bytes(voxels),
        "pages": picture_bytes("TIFF", save_all=True, append_images=pages, size=(5, 6)),
    }
    for kind, source in sources.items():
        scan = open_scan(source, kind)
        assert not scan.is_wide and not scan.has_window
        with pytest.raises(ValueError, match=f"{kind} is .*in colour: it has no grey levels"):
            scan.slice_image(0, window)
    with pytest.raises(ValueError, match="is of CT, but bytes is MR"):
        open_scan(dicom_bytes(dicom_dataset(STORED, Modality="MR"))).slice_image(0, "lung")


@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        ("middle", [3]),
        ("all", list(range(7))),
        ("largest-foreground", [4]),
        ("2-4", [2, 3, 4]),
        ("5", [5]),
        (np.int64(2), [2]),
        (-1, [6]),
        ("5,-7,5", [5, 0, 5]),
        ([6, 0], [6, 0]),
    ],
)
def test_slices_are_chosen(slices: object, expected: list[int]) -> None:
    """The foreground is what is shown brighter than a quarter of white."""
    volume = np.zeros((7, 9, 6), np.uint8)
    volume[1], volume[4, 0, :2], volume[5, 0, 0] = 63, 64, 255
    assert open_scan(volume).choose_slices(slices) == expected


@pytest.mark.parametrize(
    "slices", [7, -8, "7", "0-7", "4-2", "-8", "1,", "1,9", "last", "", "-", "1-", 1.0, True, [0, 9], None]
)
def test_slices_that_are_not_there_are_refused(slices: object) -> None:
    with pytest.raises(ValueError, match="slice"):
        open_scan(nifti_bytes(ct_volume())).choose_slices(slices)


def test_a_mask_of_another_size_or_type_is_refused() -> None:
    scan = open_scan(nifti_bytes(ct_volume()))
    for mask in (np.ones((5, 6), bool), np.ones((6, 5), np.uint8), np.ones((1, 6, 5), bool)):
        with pytest.raises(ValueError, match="expected 6 x 5 bool"):
            scan.to_source({0: mask})
    with pytest.raises(ValueError, match="no slice 7"):
        scan.to_source({7: np.ones((6, 5), bool)})
