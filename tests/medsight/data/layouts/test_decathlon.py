"""Tasks of the Medical Segmentation Decathlon."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsight.data.sources import Source, detect_layout, iterate
from tests.medsight.data.layouts.volume_files import (
    NAMES,
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


def write_task(root: Path, channels: tuple[str, ...] = ("CT",)) -> Path:
    pairs = []
    for case in range(2):
        voxels = np.stack([image_voxels(10 * channel + case) for channel in range(len(channels))], axis=3)
        save_nifti(root / f"imagesTr/case_{case}.nii.gz", voxels if len(channels) > 1 else voxels[..., 0])
        save_nifti(root / f"labelsTr/case_{case}.nii.gz", label_voxels(case))
        pairs.append({"image": f"./imagesTr/case_{case}.nii.gz", "label": f"./labelsTr/case_{case}.nii.gz"})
    save_nifti(root / "imagesTs/case_9.nii.gz", image_voxels(9))
    about = {"name": "Abdomen", "modality": {str(number): name for number, name in enumerate(channels)}}
    about |= {"labels": {"0": "background", **{str(number): name for number, name in NAMES.items()}}}
    return save_json(root / "dataset.json", {**about, "training": pairs, "test": ["./imagesTs/case_9.nii.gz"]})


def source_of(root: Path, **settings: Any) -> Source:
    return Source.from_mapping({"layout": "decathlon", "path": str(root), "site": "abdomen", **settings})


def test_rows_are_those_of_the_biomedparse_copy(tmp_path: Path) -> None:
    write_task(tmp_path / "data/Task99_Abdomen")
    cases = [
        {
            "name": f"case_{case}",
            "image": tmp_path / f"data/Task99_Abdomen/imagesTr/case_{case}.nii.gz",
            "labels": label_voxels(case),
            "common": {"modality": "CT", "site": "abdomen", "split": "train"},
        }
        for case in range(2)
    ]
    expected = read(write_biomedparse(tmp_path / "copy", cases))
    found = read(source_of(tmp_path / "data", unlabelled=0))
    assert [decoded(row) for row in found] == [decoded(row) for row in expected] and len(found) == 8
    assert {row["dataset"] for row in found} == {"Task99_Abdomen"}
    assert read(source_of(tmp_path / "data/Task99_Abdomen/dataset.json", unlabelled=0)) == found
    assert detect_layout(tmp_path / "data") == detect_layout(tmp_path / "data/Task99_Abdomen") == "decathlon"


def test_a_channel_is_chosen_by_number_by_name_or_all(tmp_path: Path) -> None:
    write_task(tmp_path, ("FLAIR", "t1gd", "T2w"))
    of = {channel: read(source_of(tmp_path, channel=channel)) for channel in (0, 1, "t1gd", "all")}
    assert of[1] == of["t1gd"] and decoded(of[0][0])["image"] != decoded(of[1][0])["image"]
    assert [row["modality"] for row in of[0] + of[1]] == ["MRI-FLAIR"] * len(of[0]) + ["MRI-T1Gd"] * len(of[1])
    assert {row["modality"] for row in of["all"]} == {"MRI-FLAIR", "MRI-T1Gd", "MRI-T2"}
    assert len(of["all"]) == 3 * len(of[0])
    assert {row["modality"] for row in read(source_of(tmp_path, channel="all", modality="MRI"))} == {"MRI"}
    [*entries] = iterate(source_of(tmp_path, channel="T9"))
    assert all("no channel 'T9'; its channels are {0: 'FLAIR'" in str(entry.error) for entry in entries)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("training", None, "expected training as a list"),
        ("training", [{"image": "../secret.nii.gz", "label": "a.nii.gz"}], "leads out of the folder"),
        ("training", [{"image": "a.nii.gz", "label": "labelsTr/none.nii.gz"}], r"none.nii.gz: no such file"),
        ("modality", {"1": "CT"}, "expected modality as"),
        ("modality", {"0": "scanner"}, "'scanner', is not known: say modality"),
        ("modality", {"0": "T1", "1": "T2"}, r"has 1 channel\(s\), and .*dataset.json names 2"),
        ("labels", {"0": "background", "1": "liver"}, "label 2 has no name"),
        ("labels", ["liver"], "expected labels as"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, field: str, value: Any, message: str) -> None:
    file = write_task(tmp_path)
    save_json(file, {**json.loads(file.read_text("utf-8")), field: value})
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read(source_of(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_the_site_is_asked_for(tmp_path: Path) -> None:
    write_task(tmp_path)
    with pytest.raises(ValueError, match="the layout decathlon does not tell the site of images"):
        read(Source("decathlon", str(tmp_path)))


def test_damaged_files_are_rows_or_named_errors(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    check_fuzz(source_of(tmp_path / "task"), tmp_path / "task", 100)
