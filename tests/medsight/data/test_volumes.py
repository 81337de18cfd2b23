"""Volumes as rows: which slices, with what pixels, and masks exactly in place."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medsight.data.modalities import modality_name
from medsight.data.sources import Source, load_source
from medsight.data.volumes import SliceOptions, VolumeOptions, slice_rows, stacked
from medsight.scans import open_scan
from medsight.scans.nifti import NiftiScan
from tests.medsight.data.layouts.volume_files import (
    NAMES,
    SHAPE,
    affine_of,
    image_voxels,
    label_voxels,
    labels_again,
    read,
    save_nifti,
)


pytest.importorskip("nibabel")


def write_pair(root: Path, affine: np.ndarray | None = None, labels: np.ndarray | None = None) -> Path:
    save_nifti(root / "labels/case.nii.gz", label_voxels(0) if labels is None else labels, affine)
    return save_nifti(root / "images/case.nii.gz", image_voxels(0), affine)


def source_of(root: Path, **settings: Any) -> Source:
    given = {"modality": "CT", "site": "abdomen", "names": NAMES, **settings}
    return Source.from_mapping({"layout": "nifti", "path": str(root), **given})


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LIA", "ASR"])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal", "AI", "RA"])
def test_masks_put_back_give_the_label_map_again(tmp_path: Path, axes: str, plane: str) -> None:
    """Whatever the axes of the array, the plane, and the proportions of its pixels."""
    path = write_pair(tmp_path, affine_of((0.7, 1.5, 4.0), axes))
    assert np.array_equal(labels_again(source_of(tmp_path, planes=[plane]), path, plane, NAMES), label_voxels(0))


@pytest.mark.parametrize("window", [None, "lung", [40, 400]])
def test_pixels_are_those_that_inference_shows(tmp_path: Path, window: Any) -> None:
    path = write_pair(tmp_path, affine_of((0.7, 1.5, 4.0)))
    rows = read(source_of(tmp_path, planes=["axial", "coronal"], window=window, unlabelled=1.0))
    assert len(rows) == SHAPE[2] + SHAPE[1]
    for row in rows:
        name, plane, _, index = row["image"]["path"].rsplit(" ", 3)
        scan = open_scan(path, plane=plane)
        assert name == f"{path}," and row["orientation"] == scan.orientation
        shown = Image.open(BytesIO(row["image"]["bytes"]))
        assert shown.mode == "L" and np.array_equal(shown, scan.slice_image(int(index), window))


def test_spacing_is_that_of_the_pixels_that_are_shown(tmp_path: Path) -> None:
    write_pair(tmp_path, affine_of((0.5, 1.5, 4.0)))
    spacing = {plane: read(source_of(tmp_path, planes=[plane]))[1]["spacing_mm"] for plane in ("axial", "sagittal")}
    assert spacing["axial"][0] == pytest.approx((0.5, 0.5))
    assert spacing["sagittal"][0] == pytest.approx((4 / (16 / 6), 1.5), rel=0.05)


def test_every_nth_slice_is_taken_and_a_share_of_those_without_a_label(tmp_path: Path) -> None:
    labels = np.zeros((4, 4, 40), np.uint8)
    labels[:, :, 10:20] = 1
    labels[2, 3, 35] = 2  # a single voxel counts
    for folder in ("a", "b"):
        save_nifti(tmp_path / folder / "labels/case.nii.gz", labels)
        save_nifti(tmp_path / folder / "images/case.nii.gz", np.arange(labels.size).reshape(labels.shape).astype("i2"))

    def taken(folder: str = "a", **settings: Any) -> list[int]:
        return [int(row["image"]["path"].split()[-1]) for row in read(source_of(tmp_path / folder, **settings))]

    labelled = [*range(10, 20), 35]
    assert taken(unlabelled=0) == labelled
    assert taken(unlabelled=0, every=5) == [10, 15, 35] and taken(unlabelled=1.0, every=7) == [*range(0, 40, 7)]
    drawn = taken()
    assert len(drawn) == len(labelled) + 3 and {*labelled} < {*drawn} and drawn == sorted(drawn)
    assert taken() == taken("b") == drawn, "drawn by the volume's name, in whatever folder"
    assert taken(planes=["LP"]) != drawn


def test_a_volume_is_read_once_for_all_planes_and_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nibabel import volumeutils

    read_from, count = volumeutils.array_from_file, []
    monkeypatch.setattr(volumeutils, "array_from_file", lambda *a, **k: count.append(a) or read_from(*a, **k))
    write_pair(tmp_path)
    assert len(read(source_of(tmp_path, planes=["axial", "coronal", "AI"], unlabelled=1.0))) == 8 + 7 + 6
    assert len(count) == 2, "the image and its labels"


def test_rows_are_read_again_when_a_file_has_changed(tmp_path: Path) -> None:
    write_pair(tmp_path)
    before = load_source(source_of(tmp_path))
    assert before["targets"] == load_source(source_of(tmp_path))["targets"]
    changed = label_voxels(0)
    changed[0, 0] = 2
    write_pair(tmp_path, labels=changed)
    assert load_source(source_of(tmp_path))["targets"] != before["targets"]


def test_masks_that_overlap_share_as_few_volumes_as_they_can() -> None:
    masks = np.zeros((3, 2, 4, 5), bool)
    masks[0, 0], masks[1, 1], masks[2, 0, 1:3] = True, True, True
    names = ("lung", "liver", "tumour")
    layers = stacked((name, "a.dcm", mask) for name, mask in zip(names, masks, strict=True))
    assert [[structure.target for structure in layer.structures] for layer in layers] == [
        ["lung", "liver"],
        ["tumour"],
    ]
    scan = open_scan(np.random.default_rng(0).integers(0, 9, (2, 4, 5)), volume=True)
    rows = [*slice_rows(scan, layers, SliceOptions(), "case", split="train")]
    assert [row["targets"] for row in rows] == [["lung", "tumour"], ["liver"]]
    two = [*slice_rows(scan, stacked([("cyst", "a.dcm", masks[2])] * 2), SliceOptions(), "case", split="train")]
    assert [mask["path"] for mask in two[0]["masks"]] == ["a.dcm, cyst, slice 0", "a.dcm, cyst, slice 0, 2"]


def test_a_scan_without_planes_refuses_them() -> None:
    with pytest.raises(ValueError, match=r"planes=\['coronal'\] are for NIfTI volumes"):
        [*slice_rows(open_scan(np.zeros((9, 8, 8))), [], VolumeOptions(planes=["coronal"]), "case", split="train")]


@pytest.mark.parametrize("axes", ["RAS", "PIL"])
def test_a_volume_is_turned_as_if_it_were_opened_so(tmp_path: Path, axes: str) -> None:
    path = save_nifti(tmp_path / "a.nii", image_voxels(0), affine_of((0.5, 1.5, 4.0), axes))
    scan = NiftiScan(path, "a", "coronal")
    for plane in ("axial", "sagittal", "AI"):
        turned, opened = scan.turned(plane), NiftiScan(path, "a", plane)
        assert turned.facts() == opened.facts() and turned.picture_size == opened.picture_size
        assert np.array_equal(turned.slice_image(1), opened.slice_image(1))
        for index in range(turned.num_slices):
            mask = turned.from_source(image_voxels(0) > 500, index)
            assert np.array_equal(turned.to_grid(turned.from_grid(mask)), mask)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every: expected a count of at least 1, got 0"),
        ({"unlabelled": 1.5}, "unlabelled: expected a share from 0 to 1"),
        ({"planes": ["top"]}, "plane='top': expected one of axial"),
        ({"planes": []}, "planes: expected a list"),
        ({"planes": "axial"}, "planes: expected a list"),
        ({"window": "liver"}, "window='liver': expected one of abdomen"),
        ({"names": {"liver": "spleen"}}, "data names: expected a name and a number"),
        ({"plane": ["axial"]}, "unknown key 'plane': did you mean 'planes'"),
    ],
)
def test_a_bad_setting_is_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source_of(tmp_path, **settings)


@pytest.mark.parametrize("layout", ["nifti", "nnunet", "decathlon", "dicom"])
def test_a_folder_of_images_is_refused_by_layouts_that_find_them(tmp_path: Path, layout: str) -> None:
    with pytest.raises(ValueError, match=f"images='other' is of no use: the layout {layout} says where they are"):
        read(Source(layout, str(tmp_path), images="other"))


def test_settings_go_to_a_recipe_and_back(tmp_path: Path) -> None:
    entry = {"layout": "nifti", "path": str(tmp_path), "planes": ["AI"], "every": 3, "names": {1: "liver"}}
    source = Source.from_mapping(entry)
    assert source.to_mapping() == {**entry, "planes": ("AI",)}
    assert Source.from_mapping(source.to_mapping()) == source


@pytest.mark.parametrize(
    ("word", "name"),
    [
        *(("CT", "CT"), ("MR", "MRI"), ("T1w", "MRI-T1"), ("t1gd", "MRI-T1Gd"), ("T2-FLAIR", "MRI-FLAIR")),
        *(("MRI-T2", "MRI-T2"), ("US", "ultrasound"), ("DX", "X-Ray"), ("X-Ray", "X-Ray"), ("noNorm", None)),
    ],
)
def test_modalities_are_called_as_in_other_data(word: str, name: str | None) -> None:
    assert modality_name(word) == name
