"""DICOM files and series: their order, place and spacing, and the grey levels that their headers ask for."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsight.scans import open_scan
from medsight.scans.windows import Window, apply_window, percentile_window
from tests.medsight.scans.scan_files import (
    STORED,
    ct_volume,
    dicom_bytes,
    dicom_dataset,
    functional_group,
    lookup_table,
    shipped_dicoms,
    shows,
    soft_tissue,
    write_series,
)


nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")


@pytest.mark.parametrize("seed", range(5))
def test_a_series_is_sorted_by_position_whatever_its_files_are_called(seed: int, tmp_path: Path) -> None:
    volume = np.moveaxis(ct_volume(), 2, 0)
    names = [f"{i}.dcm" for i in np.random.default_rng(seed).permutation(len(volume))]
    write_series(tmp_path / "series", volume, names, PatientPosition="HFS")
    scan = open_scan(tmp_path / "series")
    assert [path.name for path in scan.files] == names
    assert (scan.num_slices, scan.height, scan.width) == volume.shape
    assert scan.pixel_spacing == (1.5, 0.5) and scan.slice_spacing == 2 and scan.modality == "CT"
    for index, stored in enumerate(volume):
        assert shows(scan.slice_image(index), soft_tissue(stored))
    assert np.array_equal(scan.to_source({i: stored > 0 for i, stored in enumerate(volume)}), volume > 0)
    # DICOM says left and back where the affine says right and front
    assert np.allclose(scan.affine @ [3, 2, 1, 1], [10 - 0.5, 20 - 2 * 1.5, 30 + 3 * 2, 1])
    headers = scan.dicom_datasets()
    assert [h.InstanceNumber for h in headers] == list(range(1, 8)) and not any("PixelData" in h for h in headers)


def test_a_series_against_the_normal_is_sorted_along_it(tmp_path: Path) -> None:
    volume = np.moveaxis(ct_volume(), 2, 0)
    sagittal = [0, 1, 0, 0, 0, -1]
    for i, pixels in enumerate(volume):
        dataset = dicom_dataset(
            pixels, ImageOrientationPatient=sagittal, ImagePositionPatient=[3.0 * i, 0, 0], PixelSpacing=[1, 1]
        )
        (tmp_path / f"{i}").write_bytes(dicom_bytes(dataset))
    scan = open_scan(tmp_path)
    assert [path.name for path in scan.files] == list("6543210")  # the normal goes to the right: -x
    assert scan.slice_spacing == 3 and np.allclose(scan.affine @ [1, 0, 0, 1], [-15, 0, 0, 1])


def test_the_encodings_of_one_image_look_alike() -> None:
    paths = dict(shipped_dicoms())
    expected = open_scan(paths["MR_small_expb.dcm"]).slice_image(0)
    for kind in ("", "_RLE", "_bigendian", "_implicit"):
        assert open_scan(paths[f"MR_small{kind}.dcm"]).slice_image(0) == expected


@pytest.mark.parametrize("kind", ["gap", "twice"])
def test_uneven_slices_have_no_spacing(kind: str, tmp_path: Path) -> None:
    volume = np.moveaxis(ct_volume(), 2, 0)
    write_series(tmp_path, volume, list("abcdefg"))
    if kind == "gap":
        (tmp_path / "c").unlink()
    else:
        dataset = pydicom.dcmread(tmp_path / "c")
        dataset.SOPInstanceUID = "1.2.3.4.5"
        (tmp_path / "h").write_bytes(dicom_bytes(dataset))
    scan = open_scan(tmp_path)
    assert scan.num_slices == (6 if kind == "gap" else 8) and scan.slice_spacing is None and scan.affine is None


def test_frames_of_an_enhanced_file_have_their_own_scale_and_place() -> None:
    volume = np.moveaxis(ct_volume(), 2, 0)
    frames = [functional_group("PlanePositionSequence", ImagePositionPatient=[0, 0, 4 * i]) for i in range(7)]
    for i, frame in enumerate(frames):
        frame.update(functional_group("PixelValueTransformationSequence", RescaleIntercept=-100 * i, RescaleSlope=1))
    shared = functional_group("PixelMeasuresSequence", PixelSpacing=[3, 1])
    shared.update(functional_group("PlaneOrientationSequence", ImageOrientationPatient=[1, 0, 0, 0, 1, 0]))
    groups = {"PerFrameFunctionalGroupsSequence": frames, "SharedFunctionalGroupsSequence": [shared]}
    scan = open_scan(dicom_bytes(dicom_dataset(volume, RescaleIntercept=None, RescaleSlope=None, **groups)))
    assert scan.pixel_spacing == (3, 1) and scan.slice_spacing == 4 and scan.num_slices == 7
    for i, stored in enumerate(volume):
        assert shows(scan.slice_image(i), soft_tissue(stored.astype(int) - 100 * i))
    assert np.allclose(scan.affine @ [2, 1, 1, 1], [-1, -3, 8, 1])
    assert scan.to_source({3: np.ones((5, 6), bool)}).sum(axis=(1, 2)).tolist() == [0, 0, 0, 30, 0, 0, 0]


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"RescaleIntercept": -1024}, soft_tissue(STORED - 1024.0)),
        ({"RescaleIntercept": -1024, "BodyPartExamined": "HEAD"}, apply_window(STORED - 1024.0, Window(40, 80))),
        ({"Modality": "MR", "WindowCenter": 1, "WindowWidth": 2}, apply_window(STORED, percentile_window(STORED))),
        ({"Modality": "CR", "WindowCenter": 7, "WindowWidth": 0}, apply_window(STORED, percentile_window(STORED))),
    ],
)
def test_a_frame_is_shown_by_what_its_header_says(elements: dict, expected: np.ndarray) -> None:
    shown = np.asarray(open_scan(dicom_bytes(dicom_dataset(STORED, **elements))).slice_image(0))
    assert np.abs(shown.astype(float) - expected).max() <= 1


@pytest.mark.parametrize(
    ("elements", "hounsfield"),
    [
        ({}, True),
        ({"RescaleType": "HU"}, True),
        ({"RescaleType": "HU_MOD"}, True),
        ({"RescaleType": "US"}, False),
        ({"RescaleType": "EDW"}, False),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, False),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.3", "RescaleType": "US"}, False),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "RescaleType": "HU"}, True),
        ({"RescaleIntercept": None, "RescaleSlope": None}, False),
    ],
)
def test_a_ct_is_shown_in_the_window_of_soft_tissue_only_where_it_is_in_hounsfield_units(
    elements: dict, hounsfield: bool
) -> None:
    stored = STORED // 10
    shown = open_scan(dicom_bytes(dicom_dataset(stored, **elements))).slice_image(0)
    assert shows(shown, soft_tissue(stored) if hounsfield else apply_window(stored, percentile_window(stored)))


@pytest.mark.parametrize("value", [-2000, 63536])
@pytest.mark.parametrize("limit", [None, -1990, 63546])
def test_padding_is_black_whichever_sign_its_value_was_written_with(value: int, limit: int | None) -> None:
    stored = STORED.astype(np.int16)
    stored[0] = -2000
    dataset = dicom_dataset(stored, Modality="MR", PhotometricInterpretation="MONOCHROME1")
    dataset.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
    if limit is not None:
        dataset.add_new("PixelPaddingRangeLimit", "SS" if limit < 0 else "US", limit)
    shown = np.asarray(open_scan(dicom_bytes(dataset)).slice_image(0))
    assert (shown[0] == 0).all() and shown[1, 0] == 255


@pytest.mark.parametrize("modality", ["US", "CR", "OT"])
@pytest.mark.parametrize(
    ("elements", "factor"),
    [
        ({}, 1),
        ({"RescaleIntercept": 0, "RescaleSlope": 1}, 1),
        ({"RescaleIntercept": 0, "RescaleSlope": 2}, 2),
        ({"RescaleIntercept": 0, "RescaleSlope": 1, "PixelRepresentation": 1}, 1),
        ({"ModalityLUTSequence": [lookup_table(4, 256)]}, 4),
        ({"ModalityLUTSequence": [lookup_table(4, 256, first=1)]}, 4),
    ],
)
def test_8_bits_of_dicom_are_shown_as_they_are_unless_a_scale_or_a_sign_changes_them(
    elements: dict, factor: int, modality: str
) -> None:
    stored = np.arange(30, 70, dtype=np.uint8).reshape(5, 8)
    own = {"RescaleIntercept": None, "RescaleSlope": None, **elements}
    shown = np.asarray(open_scan(dicom_bytes(dicom_dataset(stored, Modality=modality, **own))).slice_image(0))
    as_they_are = factor == 1 and "PixelRepresentation" not in elements
    levels = stored * float(factor)  # percentiles do not see where a table begins
    assert np.array_equal(shown, stored if as_they_are else apply_window(levels, percentile_window(levels)))


def test_padding_is_black_and_does_not_count() -> None:
    stored = STORED.copy()
    stored[0] = 60000
    elements = {"Modality": "MR", "PhotometricInterpretation": "MONOCHROME1", "PixelPaddingValue": 60000}
    shown = np.asarray(open_scan(dicom_bytes(dicom_dataset(stored, **elements))).slice_image(0))
    assert (shown[0] == 0).all() and shown[1, 0] == 255 and shown[-1, -1] == 0


def test_the_series_of_the_shared_data_lies_where_its_label_map_does(shared_data: Path) -> None:
    folder = shared_data / "volumes/totalsegmentator"
    series, labels = open_scan(folder / "example_ct_dicom"), nibabel.load(folder / "example_ct_dicom_seg.nii.gz")
    corner, far = np.array([0, 0, 0, 1]), np.array([series.num_slices - 1, 511, 511, 1])
    ends = np.sort([(series.affine @ corner)[:3], (series.affine @ far)[:3]], axis=0)
    shape = np.array(labels.shape) - 1
    own = np.sort([labels.affine[:3, 3], (labels.affine @ [*shape, 1])[:3]], axis=0)
    assert np.allclose(ends, own, atol=0.01)


@pytest.mark.parametrize("fragments", [1, 2])
def test_compressed_frames_without_a_table_are_found(fragments: int) -> None:
    levels, streams = range(0, 240, 6), []
    for level in levels:
        file = BytesIO()
        Image.new("L", (8, 5), level).save(file, "JPEG")
        streams.append(file.getvalue())
    dataset = dicom_dataset(np.zeros((len(levels), 5, 8), np.uint8), Modality="US")
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.PixelData = pydicom.encaps.encapsulate(streams, fragments_per_frame=fragments, has_bot=False)
    scan = open_scan(dicom_bytes(dataset))
    for index, level in enumerate(levels):
        assert np.abs(np.asarray(scan.slice_image(index), dtype=int) - level).max() <= 1
