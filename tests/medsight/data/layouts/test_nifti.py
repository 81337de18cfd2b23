"""NIfTI volumes with label maps or masks beside them, made here and real ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsight.data.pictures import read_mask, read_picture
from medsight.data.sources import Source, detect_layout, iterate
from medsight.export import FoundRegion, write_masks
from medsight.scans import open_scan
from tests.medsight.data.layouts.volume_files import (
    NAMES,
    affine_of,
    check_fuzz,
    decoded,
    image_voxels,
    label_voxels,
    labels_again,
    read,
    save_json,
    save_nifti,
    write_biomedparse,
)


nibabel = pytest.importorskip("nibabel")


def source_of(root: Path, **settings: Any) -> Source:
    given = {"modality": "CT", "site": "abdomen", "names": NAMES, **settings}
    return Source.from_mapping({"layout": "nifti", "path": str(root), "split": None, **given})


def write_cases(root: Path, image: str, label: str) -> None:
    """Two cases, by patterns of their files' names."""
    for case in "ab":
        save_nifti(root / image.format(case), image_voxels(ord(case)))
        save_nifti(root / label.format(case), label_voxels(case == "b"))


@pytest.fixture
def expected(tmp_path: Path) -> list[dict[str, Any]]:
    """The rows of the cases' copy in BiomedParse's layout, with their pixels."""
    write_cases(tmp_path / "of", "{}.nii", "labels/{}.nii")
    common = {"modality": "CT", "site": "abdomen", "split": "train"}
    cases = [
        {"name": case, "image": tmp_path / f"of/{case}.nii", "labels": label_voxels(case == "b"), "common": common}
        for case in "ab"
    ]
    return [decoded(row) for row in read(write_biomedparse(tmp_path / "copy", cases))]


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/{}.nii.gz", "labels/{}.nii.gz"),
        ("images/{}.nii", "masks/{}_seg.nii.gz"),
        ("{}.nii.gz", "{}_seg.nii.gz"),
        ("{}.nii.gz", "{}-label.nii"),
        ("{0}/scan.nii.gz", "{0}/scan_mask.nii.gz"),
        ("{0}/images/scan.nii.gz", "{0}/labels/scan.nii.gz"),
    ],
)
def test_rows_are_those_of_the_biomedparse_copy(
    tmp_path: Path, expected: list[dict[str, Any]], image: str, label: str
) -> None:
    write_cases(tmp_path / "data", image, label)
    found = read(source_of(tmp_path / "data", unlabelled=0))
    assert [decoded(row) for row in found] == expected and len(found) == 8
    assert detect_layout(tmp_path / "data") == "nifti"


def write_subjects(root: Path, image: str = "ct.nii.gz") -> Path:
    for case in "ab":
        save_nifti(root / case / image, image_voxels(ord(case)))
        for number, name in NAMES.items():
            mask = (label_voxels(case == "b") == number).astype(np.uint8)
            save_nifti(root / case / f"segmentations/{name}.nii.gz", mask)
        save_nifti(root / case / "segmentations/rib_left_1.nii.gz", np.zeros_like(mask))
    return root


def test_a_file_a_structure_gives_the_same_rows(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    root = write_subjects(tmp_path / "total")
    found = read(source_of(root, unlabelled=0, names=None, modality=None))
    assert [decoded(row) for row in found] == expected, "a structure that is not there has no mask"
    assert detect_layout(root) == "nifti"
    (root / "meta.csv").write_text("image_id;age;split\na;40;train\nb;50;val\n", encoding="utf-8")
    assert [row["split"] for row in read(source_of(root, unlabelled=0))] == ["train"] * 4 + ["validation"] * 4
    assert {row["patient"] for row in read(source_of(root, split="val"))} == {"b"}
    assert {row["patient"] for row in read(source_of(root, patient="(.)"))} == {"a", "b"}
    with pytest.raises(ValueError, match="its modality is CT by its own word, ct; the source says ultrasound"):
        read(source_of(root, modality="ultrasound"))


def test_a_word_after_the_name_is_a_structure(tmp_path: Path) -> None:
    save_nifti(tmp_path / "case.nii.gz", image_voxels(0))
    for name, number in (("tumour_mask", 1), ("cyst", 2)):
        save_nifti(tmp_path / f"case_{name}.nii.gz", (label_voxels(0) == number).astype(np.float32))
    assert {name for row in read(source_of(tmp_path, names=None)) for name in row["targets"]} == {"tumour", "cyst"}
    save_nifti(tmp_path / "case_cyst.nii.gz", label_voxels(0))
    with pytest.raises(ValueError, match="case_cyst.nii.gz: expected the mask of one structure, by its name"):
        read(source_of(tmp_path, names=None))


def test_names_stand_in_a_file_or_in_the_label_map_itself(tmp_path: Path) -> None:
    write_cases(tmp_path, "images/{}.nii.gz", "labels/{}.nii.gz")
    rows = read(source_of(tmp_path))
    save_json(tmp_path / "names.json", NAMES)
    (tmp_path / "names.yaml").write_text("background: 0\nliver: 1\nspleen: [2]\n", encoding="utf-8")
    assert read(source_of(tmp_path, names="names.json")) == read(source_of(tmp_path, names="names.yaml")) == rows
    with pytest.raises(ValueError, match="labels/a.nii.gz: nothing says what its labels mean: say names"):
        read(source_of(tmp_path, names=None))
    table = (
        '<CaretExtension><LabelTable><Label Key="1" Red="0.0"><![CDATA[liver]]></Label>\n<Label Key="2">spleen</Label>'
    )
    for case, code, text in (("a", 0, table), ("b", "comment", json.dumps({"0": "background", **NAMES}))):
        image = nibabel.load(tmp_path / f"labels/{case}.nii.gz")
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(code, text.encode()))
        nibabel.save(
            nibabel.Nifti1Image(label_voxels(case == "b"), None, image.header), tmp_path / f"labels/{case}.nii.gz"
        )
    assert [decoded(row) for row in read(source_of(tmp_path, names=None))] == [decoded(row) for row in rows]


def test_what_the_export_writes_is_read_back(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "case.nii.gz", image_voxels(0), affine_of((0.5, 1.5, 4.0), "LPS"))
    scan = open_scan(path)
    regions = [
        FoundRegion(index, scan.from_source(label_voxels(0) == number, index), name, "", None)
        for index in range(scan.num_slices)
        for number, name in NAMES.items()
    ]
    write_masks(scan, [region for region in regions if region.mask.any()], tmp_path / "out", formats=["nifti"])
    shutil.move(tmp_path / "out/labels.nii.gz", tmp_path / "case_seg.nii.gz")
    source = source_of(tmp_path, names=None, planes=["coronal"])
    assert np.array_equal(labels_again(source, path, "coronal", NAMES), label_voxels(0))


@pytest.mark.parametrize(
    ("labels", "affine", "message"),
    [
        (label_voxels(0)[:-1], None, "7 x 7 x 6 and 8 x 7 x 6 voxels; resample it to its image"),
        (label_voxels(0), affine_of((1.5, 1.5, 4.2)), "their affines lie up to 0.25 voxels apart"),
        (label_voxels(0), affine_of(axes="LPS"), "their affines lie up to 14 voxels apart"),
        (label_voxels(0) * 3, None, "label 3 has no name; named are"),
        (label_voxels(0) * 0.4, None, "expected the whole number of a label a voxel, got 0.4"),
        (label_voxels(0) * -1.0, None, "expected labels from 0 to 65535, got -2 to"),
        (np.stack([label_voxels(0)] * 2, axis=3), None, "holds 2 volumes: expected a label map of one"),
    ],
)
def test_labels_on_another_grid_or_of_another_kind_are_refused(
    tmp_path: Path, labels: np.ndarray, affine: np.ndarray | None, message: str
) -> None:
    save_nifti(tmp_path / "case.nii.gz", image_voxels(0))
    save_nifti(tmp_path / "case_seg.nii.gz", labels, affine)
    [entry] = iterate(source_of(tmp_path))
    assert message in str(entry.error) and str(tmp_path / "case_seg.nii.gz") in str(entry.error)


def test_volumes_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("one", "two", "two/more"):
        write_cases(tmp_path / folder, "{}.nii.gz", "{}_seg.nii.gz")
    rows = read(source_of(tmp_path, unlabelled=0))
    assert [row["patient"] for row in rows[::4]] == ["one/a", "one/b", "two/a", "two/b", "two/more/a", "two/more/b"]
    assert {row["patient"] for row in read(source_of(tmp_path, where={"case": "two/a"}))} == {"two/a"}
    assert {row["patient"] for row in read(source_of(tmp_path / "one"))} == {"a", "b"}


def test_a_folder_without_labels_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_cases(tmp_path, "images/{}.nii.gz", "labels/{}.nii.gz")
    save_nifti(tmp_path / "imagesTs/c.nii.gz", image_voxels(0))
    assert {row["patient"] for row in read(source_of(tmp_path))} == {"a", "b"}
    assert f"no volume has labels in 1 of its folders: {tmp_path / 'imagesTs'}" in caplog.text


def test_what_has_no_partner_is_named(tmp_path: Path) -> None:
    write_cases(tmp_path, "images/{}.nii.gz", "labels/{}.nii.gz")
    save_nifti(tmp_path / "images/c.nii.gz", image_voxels(0))
    save_nifti(tmp_path / "labels/d.nii.gz", label_voxels(0))
    errors = [str(entry.error) for entry in iterate(source_of(tmp_path)) if entry.error]
    assert errors == [
        f"{tmp_path}/images/c.nii.gz: no label map of it, by its name, beside it",
        f"{tmp_path}/labels/d.nii.gz: no image of this label map, by its name, beside it",
    ]
    with pytest.raises(FileNotFoundError, match="no NIfTI volume with labels: expected images/CASE.nii.gz"):
        read(source_of(tmp_path / "labels"))


def test_damaged_files_are_rows_or_named_errors(tmp_path: Path) -> None:
    write_cases(tmp_path / "data", "{}.nii.gz", "{}_seg.nii.gz")
    save_nifti(tmp_path / "data/c.nii", image_voxels(0))
    save_nifti(tmp_path / "data/c_liver.nii", (label_voxels(0) == 1).astype(np.uint8))
    check_fuzz(source_of(tmp_path / "data"), tmp_path / "data", 120)


def test_real_volumes_give_their_label_maps_again(shared_data: Path) -> None:
    """The hippocampus by pairs of folders, floats among its images and labels."""
    root, names = shared_data / "volumes/msd_hippocampus", {1: "anterior", 2: "posterior"}
    for case in ("hippocampus_001", "hippocampus_003"):
        path = root / f"images/{case}.nii.gz"
        source = source_of(root, names=names, planes=["AI"], unlabelled=0, where={"case": case}, modality="MRI-T1")
        expected = nibabel.load(root / f"labels/{case}.nii.gz").get_fdata().astype(np.uint8)
        assert np.array_equal(labels_again(source, path, "AI", names), expected)


def test_real_masks_are_those_of_the_biomedparse_copy(shared_data: Path) -> None:
    """Which has some slices of three of the volumes, four times as large, and a region of both structures."""
    names = {"anterior hippocampus": 1, "posterior hippocampus": 2, "hippocampus": [1, 2]}
    ours = source_of(shared_data / "volumes/msd_hippocampus", names=names, planes=["AI"], modality="MRI-T1")
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for row in read(ours):
        size = read_picture(row["image"]).size
        for target, mask in zip(row["targets"], row["masks"], strict=True):
            found.setdefault((row["patient"], target), []).append(read_mask(mask, size))
    compared = 0
    for row in read(Source("biomedparse", str(shared_data / "segmentation/msd_hippocampus"), split=None)):
        patient, (width, height) = row["patient"].partition(":")[2], read_picture(row["image"]).size
        if any(patient == known for known, _ in found):
            for target, mask in zip(row["targets"], row["masks"], strict=True):
                drawn = read_mask(mask, (width, height))[2::4, 2::4]
                assert any(np.array_equal(drawn, own) for own in found[patient, target]), mask["path"]
                compared += 1
    assert compared == 9


def test_a_real_label_map_names_its_structures(shared_data: Path, tmp_path: Path) -> None:
    for name in ("example_mr.nii.gz", "example_mr_seg.nii.gz"):
        (tmp_path / name).symlink_to(shared_data / "volumes/totalsegmentator" / name)
    rows = read(source_of(tmp_path, names=None, modality="MRI", unlabelled=0))
    assert {"spleen", "liver", "kidney_left"} <= {target for row in rows for target in row["targets"]}
    row = next(row for row in rows if "liver" in row["targets"])
    assert read_mask(row["masks"][row["targets"].index("liver")], read_picture(row["image"]).size).any()
