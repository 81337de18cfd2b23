"""nnU-Net's raw data sets: channels, regions, pictures, stacks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medsight.data.pictures import read_mask, read_picture
from medsight.data.sources import Source, detect_layout, iterate
from tests.medsight.data.layouts.volume_files import (
    NAMES,
    affine_of,
    check_fuzz,
    decoded,
    image_voxels,
    label_voxels,
    read,
    save_json,
    save_nifti,
    write_biomedparse,
)


pytest.importorskip("nibabel")
ABOUT = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "spleen": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def write_raw(root: Path, **about: Any) -> Path:
    """Two cases to train on, one to test on, each with its labels, and one without."""
    save_json(root / "dataset.json", {**ABOUT, **about})
    for case, suffix in enumerate(("Tr", "Tr", "Ts")):
        for channel in range(len(about.get("channel_names", "1"))):
            save_nifti(root / f"images{suffix}/case_{case}_{channel:04d}.nii.gz", image_voxels(10 * channel + case))
        save_nifti(root / f"labels{suffix}/case_{case}.nii.gz", label_voxels(case))
    save_nifti(root / "imagesTs/case_9_0000.nii.gz", image_voxels(9))
    return root


def source_of(root: Path, **settings: Any) -> Source:
    return Source.from_mapping({"layout": "nnunet", "path": str(root), "site": "abdomen", "split": None, **settings})


def test_rows_are_those_of_the_biomedparse_copy(tmp_path: Path) -> None:
    root = write_raw(tmp_path / "raw/Dataset001_Abdomen")
    cases = [
        {
            "name": f"case_{case}",
            "image": root / f"images{suffix}/case_{case}_0000.nii.gz",
            "labels": label_voxels(case),
            "common": {"modality": "CT", "site": "abdomen", "split": "test" if suffix == "Ts" else "train"},
        }
        for case, suffix in enumerate(("Tr", "Tr", "Ts"))
    ]
    expected = read(write_biomedparse(tmp_path / "copy", cases))
    for path in (tmp_path / "raw", root, root / "dataset.json", tmp_path / "raw/Dataset*"):
        found = read(source_of(path, unlabelled=0))
        assert [decoded(row) for row in found] == [decoded(row) for row in expected] and len(found) == 12
    assert {row["split"] for row in read(source_of(root, split="test"))} == {"test"}
    assert detect_layout(root) == detect_layout(tmp_path / "raw") == "nnunet"


def test_a_region_is_of_several_labels_and_what_is_ignored_is_none(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    write_raw(tmp_path, labels=labels, regions_class_order=[1, 2])
    ignored = label_voxels(0)
    ignored[:, :, 0] = 3
    save_nifti(tmp_path / "labelsTr/case_0.nii.gz", ignored)
    entries = [*iterate(source_of(tmp_path, unlabelled=0, split="train"))]
    rows = [entry.checked() for entry in entries]
    assert {tuple(row["targets"]) for row in rows} == {("whole",), ("whole", "core")}
    [warning] = [warning for entry in entries for warning in entry.warnings]
    assert "'ignore' is taken for no structure" in warning
    both = next(row for row in rows if len(row["targets"]) == 2)
    whole, core = (read_mask(mask, read_picture(both["image"]).size) for mask in both["masks"])
    assert (core <= whole).all() and core.sum() < whole.sum()


def test_channels_are_images_of_their_own_modality(tmp_path: Path) -> None:
    write_raw(tmp_path, channel_names={"0": "T2", "1": "ADC"})
    found = {channel: read(source_of(tmp_path, channel=channel)) for channel in (0, "ADC", "all")}
    assert {row["modality"] for row in found["ADC"]} == {"MRI-ADC"} and len(found["all"]) == 2 * len(found[0])
    where = read(source_of(tmp_path, channel="all", where={"channel": "T2", "case": "case_1"}))
    assert {(row["modality"], row["patient"]) for row in where} == {("MRI-T2", "case_1")}
    save_nifti(tmp_path / "imagesTr/case_0_0001.nii.gz", image_voxels(0)[:-1])
    errors = [str(entry.error) for entry in iterate(source_of(tmp_path, channel="all")) if entry.error]
    assert len(errors) == 1 and "case_0_0001.nii.gz and its image" in errors[0] and "7 x 7 x 6" in errors[0]


def save_png(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


COLOURS = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "road": 1}}


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp"])
def test_pictures_in_colour_lie_in_one_file_or_in_three(tmp_path: Path, files: int, ending: str) -> None:
    save_json(tmp_path / "dataset.json", {**COLOURS, "file_ending": ending})
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    for name, labels in (("a", np.eye(9, 12, dtype=np.uint8)), ("b", np.zeros((9, 12), np.uint8))):
        for number in range(files):
            save_png(tmp_path / f"imagesTr/{name}_{number:04d}{ending}", pixels if files == 1 else pixels[..., number])
        save_png(tmp_path / f"labelsTr/{name}{ending}", labels)
    first, second = read(source_of(tmp_path, modality="endoscope", unlabelled=0))
    assert np.array_equal(read_picture(first["image"]), pixels)
    assert np.array_equal(read_mask(first["masks"][0], (12, 9)), np.eye(9, 12, dtype=bool))
    assert (first["image"]["bytes"] is None) == (files == 1) and second["masks"] == []
    assert [row["orientation"] for row in (first, second)] == [None, None]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((9, 11), np.uint8), "is of 9 x 11 pixels, its image .* of 9 x 12"),
        (np.dstack([np.eye(9, 12, dtype=np.uint8)] * 2 + [np.zeros((9, 12), np.uint8)]), "is in colour: expected the"),
        (np.full((9, 12), 2, np.uint8), "label 2 has no name"),
        (np.full((9, 12), 1, np.uint16), None),
        (np.dstack([np.ones((9, 12), np.uint8)] * 3), None),
        (np.ones((9, 12), bool), None),
    ],
)
def test_the_label_map_of_a_picture_is_of_its_size_and_of_numbers(
    tmp_path: Path, labels: np.ndarray, message: str | None
) -> None:
    save_json(tmp_path / "dataset.json", {**COLOURS, "file_ending": ".png"})
    save_png(tmp_path / "imagesTr/a_0000.png", np.full((9, 12, 3), 7, np.uint8))
    label = save_png(tmp_path / "labelsTr/a.png", labels)
    [entry] = iterate(source_of(tmp_path, modality="endoscope"))
    if message is None:
        assert entry.checked()["targets"] == ["road"]
    else:
        with pytest.raises(ValueError, match=f"{label}:? {message}"):
            entry.checked()


def write_stack(root: Path) -> Path:
    save_json(root / "dataset.json", {**ABOUT, "channel_names": {"0": "fluorescence"}, "file_ending": ".tif"})
    stacks = {"imagesTr/a_0000.tif": image_voxels(0).astype(np.uint16), "labelsTr/a.tif": label_voxels(0)}
    for name, voxels in stacks.items():
        (root / name).parent.mkdir()
        first, *rest = map(Image.fromarray, voxels)
        first.save(root / name, save_all=True, append_images=rest)
    return root


def test_a_stack_of_pages_is_a_volume(tmp_path: Path) -> None:
    write_stack(tmp_path)
    rows = read(source_of(tmp_path, unlabelled=0))
    shown = [label for label in label_voxels(0) if label.any()]
    assert len(rows) == len(shown)
    for row, label in zip(rows, shown, strict=True):
        masks = {name: read_mask(mask, (6, 7)) for name, mask in zip(row["targets"], row["masks"], strict=True)}
        assert masks.keys() == {NAMES[number] for number in np.unique(label[label > 0])}
        for number, name in NAMES.items():
            assert np.array_equal(masks.get(name, np.zeros((7, 6), bool)), label == number)


def test_cases_may_be_listed(tmp_path: Path) -> None:
    write_raw(tmp_path)
    (tmp_path / "imagesTr/case_0_0000.nii.gz").rename(tmp_path / "scan.nii.gz")
    listed = {"zero": {"images": ["scan.nii.gz"], "label": "labelsTr/case_0.nii.gz"}}
    save_json(tmp_path / "dataset.json", {**ABOUT, "dataset": listed})
    assert {row["patient"] for row in read(source_of(tmp_path, split="train"))} == {"zero"}
    listed["zero"]["images"] = ["../scan.nii.gz"]
    save_json(tmp_path / "dataset.json", {**ABOUT, "dataset": listed})
    with pytest.raises(ValueError, match="dataset.json, zero: '../scan.nii.gz' leads out of the folder"):
        read(source_of(tmp_path))


def test_a_patient_is_found_in_the_names_of_files(tmp_path: Path) -> None:
    write_raw(tmp_path)
    assert {row["patient"] for row in read(source_of(tmp_path, patient=r"^(case)_\d"))} == {"case"}


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"file_ending": ".mha"}, "file_ending is '.mha', and .nii.gz, .nii, .*: convert"),
        ({"channel_names": {"0": "noNorm"}}, "word for the modality, 'noNorm', is not known: say modality: NAME"),
        ({"channel_names": ["CT"]}, "expected channel_names as"),
        ({"channel_names": {"0": "CT", "1": "PET"}}, ""),
        ({"labels": {"background": 0, "liver": 1}}, "labelsTr/case_0.nii.gz: label 2 has no name"),
        ({"labels": {"liver": [1, "two"]}}, "expected a name and a number or numbers of a label"),
    ],
)
def test_what_is_wrong_with_dataset_json_is_named(tmp_path: Path, about: dict[str, Any], message: str) -> None:
    write_raw(tmp_path)
    save_json(tmp_path / "dataset.json", {**ABOUT, **about})
    settings = {"channel": 1} if "channel_names" in about and not message else {}
    with pytest.raises(ValueError, match=message or "case_0_0001.nii.gz: no such file: expected channel 1"):
        read(source_of(tmp_path, **settings))


def test_what_is_wrong_with_a_case_is_named_and_others_are_read(tmp_path: Path) -> None:
    root = write_raw(tmp_path)
    (root / "labelsTr/case_0.nii.gz").unlink()
    save_nifti(root / "labelsTr/case_1.nii.gz", label_voxels(1), affine_of((1.5, 1.5, 5.0)))
    errors = [str(entry.error) for entry in iterate(source_of(root)) if entry.error]
    assert len(errors) == 2 and {row["patient"] for row in read(source_of(root, split="test"))} == {"case_2"}
    assert any("labelsTr/case_0.nii.gz: no such file" in error for error in errors)
    assert any("case_1.nii.gz and its image" in error and "two grids" in error for error in errors)


def test_damaged_files_are_rows_or_named_errors(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw")
    check_fuzz(source_of(tmp_path / "raw"), tmp_path / "raw", 100)
    save_json(tmp_path / "png/dataset.json", {**COLOURS, "file_ending": ".png"})
    save_png(tmp_path / "png/imagesTr/a_0000.png", np.full((9, 12, 3), 7, np.uint8))
    save_png(tmp_path / "png/labelsTr/a.png", np.eye(9, 12, dtype=np.uint8))
    check_fuzz(source_of(tmp_path / "png", modality="endoscope"), tmp_path / "png", 60)
    check_fuzz(source_of(write_stack(tmp_path / "stack")), tmp_path / "stack", 60)
