"""`window="file"`: the window or lookup table that a file states for itself, or an error that names the file."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from medsight.scans import open_scan
from medsight.scans.windows import Window, apply_window
from tests.medsight.scans.scan_files import (
    STORED,
    ct_volume,
    dicom_bytes,
    dicom_dataset,
    functional_group,
    lookup_table,
    on_grid,
    picture_bytes,
    shipped_dicoms,
    write_series,
)


nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

MODALITIES = ("CT", "MR", "PT", "NM", "DX", "US", None)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"WindowCenter": 2000.5, "WindowWidth": 4001}, STORED / 4000 * 255),
        ({"WindowCenter": [2000.5, 1], "WindowWidth": [4001, 2]}, STORED / 4000 * 255),
        (
            {"WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "SIGMOID"},
            255 / (1 + np.exp(-4 * (STORED - 2000.0) / 1000)),
        ),
        (
            {"WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"},
            apply_window(STORED, Window(2000, 1000)),
        ),
        ({"WindowCenter": 1000.5, "WindowWidth": 4001, "RescaleIntercept": -1000}, STORED / 4000 * 255),
    ],
)
def test_a_dicom_of_any_modality_is_shown_with_its_first_window(
    elements: dict, expected: np.ndarray, modality: str | None
) -> None:
    for photometric in ("MONOCHROME2", "MONOCHROME1"):
        dataset = dicom_dataset(STORED, Modality=modality, PhotometricInterpretation=photometric, **elements)
        scan = open_scan(dicom_bytes(dataset))
        assert scan.has_window
        levels = expected if photometric == "MONOCHROME2" else 255 - expected
        assert np.abs(np.asarray(scan.slice_image(0, "file"), dtype=float) - levels).max() <= 1
        if modality in ("DX", "US", None):
            assert scan.slice_image(0) == scan.slice_image(0, "file")


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_lookup_table_goes_before_a_window(modality: str | None) -> None:
    tables = {"ModalityLUTSequence": [lookup_table(2, 4000)], "VOILUTSequence": [lookup_table(8, 8000)]}
    dataset = dicom_dataset(STORED, Modality=modality, WindowCenter=1, WindowWidth=2, **tables)
    del dataset.RescaleSlope, dataset.RescaleIntercept
    scan = open_scan(dicom_bytes(dataset))
    assert scan.has_window
    shown = np.asarray(scan.slice_image(0, "file"), dtype=float)
    assert np.abs(shown - STORED * 16.0 / 65535 * 255).max() <= 1
    if modality in ("DX", "US", None):
        assert scan.slice_image(0) == scan.slice_image(0, "file")


def test_frames_and_files_have_windows_of_their_own(tmp_path: Path) -> None:
    volume = np.stack([STORED, STORED, STORED])
    windows = [(1000, 500), (2000, 900), (50, 4000)]
    groups = [functional_group("FrameVOILUTSequence", WindowCenter=c, WindowWidth=w) for c, w in windows]
    scan = open_scan(dicom_bytes(dicom_dataset(volume, Modality="MR", PerFrameFunctionalGroupsSequence=groups)))
    write_series(tmp_path, volume, list("abc"), Modality="PT")
    for name, (centre, width) in zip("abc", windows, strict=True):
        dataset = pydicom.dcmread(tmp_path / name)
        dataset.WindowCenter, dataset.WindowWidth = centre, width
        (tmp_path / name).write_bytes(dicom_bytes(dataset))
    series = open_scan(tmp_path)
    for index, (centre, width) in enumerate(windows):
        expected = apply_window(STORED, Window(centre, width, "LINEAR"))
        assert np.array_equal(scan.slice_image(index, "file"), expected)
        assert np.array_equal(on_grid(series.slice_image(index, "file"), expected.shape), expected)


@pytest.mark.parametrize("where", ["PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"])
def test_a_lookup_table_in_the_functional_groups_is_that_of_their_frames(where: str) -> None:
    groups = [functional_group("FrameVOILUTSequence", VOILUTSequence=[lookup_table(16, 4000)])]
    groups *= 3 if where.startswith("Per") else 1
    scan = open_scan(dicom_bytes(dicom_dataset(np.stack([STORED] * 3), Modality="MG", **{where: groups})))
    assert scan.has_window
    for index in range(3):
        assert np.abs(np.asarray(scan.slice_image(index), dtype=int) - STORED * 16 / 65535 * 255).max() <= 1
        assert scan.slice_image(index) == scan.slice_image(index, "file")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_a_nifti_is_shown_from_cal_min_to_cal_max(packed: bool, second: bool) -> None:
    kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    image = kind(ct_volume(), np.eye(4))
    image.header["cal_min"], image.header["cal_max"] = -200, 300
    image.header.set_slope_inter(2, -10)
    scan = open_scan(gzip.compress(image.to_bytes()) if packed else image.to_bytes())
    assert scan.has_window
    values = ct_volume()[::-1, ::-1, 3].T * 2.0 - 10
    assert np.array_equal(scan.slice_image(3, "file"), apply_window(values, Window(50, 500)))
    assert np.array_equal(scan.slice_image(3, "file"), scan.slice_image(3, (50, 500)))


def calibrated(low: float, high: float) -> bytes:
    image = nibabel.Nifti1Image(ct_volume(), np.eye(4))
    image.header["cal_min"], image.header["cal_max"] = low, high
    return image.to_bytes()


WITHOUT = {
    "dicom": dicom_bytes(dicom_dataset(STORED)),
    "dicom with a window of no width": dicom_bytes(dicom_dataset(STORED, WindowCenter=7, WindowWidth=0)),
    "dicom with half a window": dicom_bytes(dicom_dataset(STORED, WindowCenter=7)),
    "nifti": calibrated(0, 0),
    "nifti upside down": calibrated(300, -200),
    "nifti of nan": calibrated(np.nan, 3),
    "picture of 16 bits": picture_bytes("PNG", "I;16"),
    "volume": np.stack([STORED] * 7),
}


@pytest.mark.parametrize("kind", list(WITHOUT))
def test_a_file_without_a_window_is_named_with_what_to_use_instead(kind: str) -> None:
    scan = open_scan(WITHOUT[kind], "the source")
    assert not scan.has_window
    with pytest.raises(ValueError, match="the source states no window of its own") as error:
        scan.slice_image(0, "file")
    assert all(word in str(error.value) for word in ("abdomen", "soft tissue", "(centre, width)", "leave"))


def test_the_one_slice_without_a_window_is_named(tmp_path: Path) -> None:
    write_series(tmp_path / "series", np.stack([STORED] * 3), list("abc"), WindowCenter=9, WindowWidth=8)
    dataset = pydicom.dcmread(tmp_path / "series/b")
    del dataset.WindowCenter
    (tmp_path / "series/b").write_bytes(dicom_bytes(dataset))
    scan = open_scan(tmp_path / "series")
    scan.slice_image(0, "file")
    with pytest.raises(ValueError, match=r"series/b states no window"):
        scan.slice_image(1, "file")


def test_windows_of_real_files(shared_data: Path) -> None:
    shipped = dict(shipped_dicoms())
    for path, centre, width in [
        (shipped["MR_small.dcm"], 600, 1600),
        (shipped["examples_overlay.dcm"], 450, 790),  # the first of two
        (shipped["J2K_pixelrep_mismatch.dcm"], 40, 100),
        (shared_data / "volumes/totalsegmentator/example_ct_dicom", 40, 300),
    ]:
        scan = open_scan(path)
        assert scan.has_window
        header = scan.dicom_datasets()[0]
        shown = np.asarray(scan.slice_image(0, "file"), dtype=int)
        exact = np.asarray(scan.slice_image(0, (centre - 0.5, width - 1)), dtype=int)  # PS3.3 C.11.2.1.2.1
        assert float(np.atleast_1d(header.WindowCenter)[0]) == centre and np.abs(shown - exact).max() <= 1
        assert 0 < shown.mean() < 255
