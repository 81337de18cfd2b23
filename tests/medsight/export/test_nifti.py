"""NIfTI label maps, read back by SimpleITK: the same voxels in the same place as the source that SimpleITK reads."""

import gzip
import json
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from medsight.export import FoundRegion, write_masks
from medsight.scans import open_scan

from .scans import BRIGHT, SENTINEL, bright_regions, bright_volume, write_dicom_series, write_nifti_volume


sitk = pytest.importorskip("SimpleITK")
REAL_NIFTI = (
    ("totalsegmentator/example_ct.nii.gz", 200),
    ("totalsegmentator/example_mr.nii.gz", 300),
    ("tcia_sts/sts002_CT.nii.gz", 100),
    ("msd_hippocampus/images/hippocampus_001.nii.gz", 100),
)


def assert_same_grid(labels: "sitk.Image", source: "sitk.Image") -> None:
    assert labels.GetSize() == source.GetSize()
    assert labels.GetSpacing() == pytest.approx(source.GetSpacing(), rel=1e-5)
    assert labels.GetOrigin() == pytest.approx(source.GetOrigin(), abs=1e-3)
    assert labels.GetDirection() == pytest.approx(source.GetDirection(), abs=1e-5)


@pytest.mark.parametrize("plane", [None, "axial", "coronal", "sagittal"])
def test_voxels_lie_where_the_source_has_them(plane: str | None, nifti: Path, tmp_path: Path) -> None:
    scan = open_scan(nifti, plane=plane)
    write_masks(scan, bright_regions(scan), tmp_path / "out", ["nifti", "png", "coco"])
    assert SENTINEL.encode() in gzip.decompress(nifti.read_bytes())
    for file in (tmp_path / "out").iterdir():  # nothing of the source's header but its geometry
        content = file.read_bytes()
        assert SENTINEL.encode() not in (gzip.decompress(content) if file.suffix == ".gz" else content)
    content = json.loads((tmp_path / "out" / "regions.json").read_text("utf-8"))
    assert content["scan"]["plane"] == (plane or "axial")
    labels, source = sitk.ReadImage(tmp_path / "out" / "labels.nii.gz"), sitk.ReadImage(nifti)
    assert_same_grid(labels, source)
    assert np.array_equal(sitk.GetArrayFromImage(labels), sitk.GetArrayFromImage(source) > BRIGHT / 2)


@pytest.mark.parametrize(("qform", "sform"), [(0, 1), (1, 0), (1, 1), (2, 4), (0, 0)])
def test_any_reader_aligns_it(qform: int, sform: int, tmp_path: Path) -> None:
    """Viewers differ in which of NIfTI's two transforms they follow: both are as in the source."""
    path = tmp_path / "volume.nii"
    write_nifti_volume(path, bright_volume((9, 12, 8)), qform, sform)
    scan = open_scan(path)
    write_masks(scan, bright_regions(scan), tmp_path / "out", ["nifti"])
    written, source = nibabel.load(tmp_path / "out" / "labels.nii.gz"), nibabel.load(path)
    for form in ("get_qform", "get_sform"):
        theirs, code = getattr(source, form)(coded=True)
        ours, our_code = getattr(written, form)(coded=True)
        assert our_code == code and (theirs is None) == (ours is None)
        assert theirs is None or np.allclose(ours, theirs, atol=1e-5)
    assert written.header.get_xyzt_units() == source.header.get_xyzt_units()


@pytest.mark.parametrize(("name", "level"), REAL_NIFTI)
def test_real_volumes(volumes: Path, name: str, level: float, tmp_path: Path) -> None:
    scan = open_scan(volumes / name)
    write_masks(scan, bright_regions(scan, level), tmp_path / "out", ["nifti"])
    labels, source = sitk.ReadImage(tmp_path / "out" / "labels.nii.gz"), sitk.ReadImage(volumes / name)
    assert_same_grid(labels, source)
    expected = sitk.GetArrayFromImage(source) > level
    assert 0 < expected.sum() < expected.size
    # Values within one of the level may fall on either side of it: displaying rounds.
    differs = (sitk.GetArrayFromImage(labels) > 0) != expected
    assert not differs[abs(sitk.GetArrayFromImage(source) - level) > 1].any()


def test_a_dicom_series_as_nifti(series: Path, tmp_path: Path) -> None:
    scan = open_scan(series)
    write_masks(scan, bright_regions(scan), tmp_path / "out", ["nifti"])
    labels = sitk.ReadImage(tmp_path / "out" / "labels.nii.gz")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(series)))
    source = reader.Execute()
    moved = sitk.Resample(labels, source, sitk.Transform(), sitk.sitkNearestNeighbor)
    assert np.array_equal(sitk.GetArrayFromImage(moved), sitk.GetArrayFromImage(source) > BRIGHT / 2)
    assert labels.GetSpacing() == pytest.approx((0.5, 0.75, 2.5), rel=1e-4)


def test_a_tilted_gantry_gives_no_wrong_quaternion(tmp_path: Path) -> None:
    """Such a grid is sheared, which only one of NIfTI's two transforms can say; the other one is marked as unset."""
    files = write_dicom_series(tmp_path / "series", bright_volume((4, 20, 16)))
    for index, file in enumerate(files):
        dataset = pydicom.dcmread(file)
        down = np.array(dataset.ImageOrientationPatient[3:], dtype=float)
        dataset.ImagePositionPatient = [float(x) for x in dataset.ImagePositionPatient + index * 0.9 * down]
        dataset.save_as(file)
    scan = open_scan(tmp_path / "series")
    write_masks(scan, bright_regions(scan), tmp_path / "out", ["nifti"])
    image = nibabel.load(tmp_path / "out" / "labels.nii.gz")
    assert image.get_sform(coded=True)[1] == 1 and image.get_qform(coded=True) == (None, 0)
    for index, file in enumerate(files):
        dataset = pydicom.dcmread(file)
        corner = image.affine @ [0, 0, index, 1] * [-1, -1, 1, 1]
        assert corner[:3] == pytest.approx(list(dataset.ImagePositionPatient), abs=1e-3)
        assert np.array_equal(np.asarray(image.dataobj)[:, :, index].T > 0, dataset.pixel_array > BRIGHT / 2)


def test_the_smaller_of_overlapping_labels_stays_visible(nifti: Path, tmp_path: Path) -> None:
    scan = open_scan(nifti)
    organ, lesion, other = (np.zeros((scan.height, scan.width), dtype=bool) for _ in range(3))
    organ[2:12, 2:12], lesion[4:7, 4:8], other[10:14, 2:4] = True, True, True
    found = [("lesion", lesion), ("liver", organ), ("Lesion", lesion), ("vessel", other)]
    regions = [FoundRegion(1, mask, label, "[C0_1]", 0.9) for label, mask in found]
    write_masks(scan, regions, tmp_path / "out", ["nifti"])
    content = json.loads((tmp_path / "out" / "regions.json").read_text("utf-8"))
    assert {label["name"]: label["number"] for label in content["labels"]} == {"lesion": 1, "liver": 2, "vessel": 3}
    assert content["overlaps"] == [
        {"labels": ["liver", "lesion"], "voxels": 12, "kept": "lesion"},
        {"labels": ["liver", "vessel"], "voxels": 4, "kept": "vessel"},
    ]
    image = nibabel.load(tmp_path / "out" / "labels.nii.gz")
    values = np.asarray(image.dataobj)
    assert image.get_data_dtype() == np.uint8
    assert [(values == number).sum() for number in (1, 2, 3)] == [12, 100 - 12 - 4, 8]
    names = json.loads(image.header.extensions[0].get_content())
    assert names == {"0": "background", "1": "lesion", "2": "liver", "3": "vessel"}
