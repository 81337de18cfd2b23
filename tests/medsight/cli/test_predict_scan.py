"""`medsight predict` and `Predictor` on volumes and series: slices, planes, windows, millimetres, patients unnamed."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medsight import Predictor
from tests.medsight.answers import contents, same
from tests.shared import shared_folder


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    nibabel = pytest.importorskip("nibabel")
    voxels = np.random.default_rng(0).integers(0, 900, (20, 24, 6), dtype=np.int16)
    path = tmp_path / "DOE^JANE.nii.gz"
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2.0, 0.5, 3.0, 1.0])), path)
    return path


def test_slices_of_a_volume_are_answered_and_measured(
    predict: Callable, volume: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ("--slices", "1-3", "--formats", "png,nifti", "--force-region", "--batch-size", "2")
    assert predict(volume, *arguments, "--window", "400,800", "--output", str(output)) == 0
    answer = json.loads((output / "answer.json").read_text("utf-8"))
    assert [one["slice"] for one in answer["slices"]] == [1, 2, 3] and "text" not in answer
    assert answer["scan"]["pixel_spacing_mm"] == [0.5, 2.0] and answer["scan"]["slice_spacing_mm"] == 3.0
    regions = [region for one in answer["slices"] for region in one["regions"]]
    assert [region["mask"] for region in regions] == [f"mask-{n:02d}.png" for n in range(1, len(regions) + 1)]
    assert all(region["area_mm2"] == pytest.approx(region["area"]) for region in regions)
    assert {"labels.nii.gz", "overlay.png", "regions.json"} < set(answer["files"])
    printed = capsys.readouterr().out
    assert "slice 1: " in printed and "area (mm²)" in printed and " ml" in printed


def test_a_volume_is_cut_along_the_plane_and_shown_with_its_own_window(
    predict: Callable, volume: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import nibabel

    output = ("--output", str(tmp_path / "out"))
    assert predict(volume, "--window", "file", *output) == 1
    assert f"{volume} states no window of its own" in capsys.readouterr().err and not (tmp_path / "out").exists()
    image = nibabel.load(volume)
    image.header["cal_min"], image.header["cal_max"] = 100, 500
    nibabel.save(image, tmp_path / "windowed.nii")
    arguments = ("--plane", "coronal", "--window", "file", "--slices", "20-23", "--formats", "png,nifti")
    assert predict(tmp_path / "windowed.nii", *arguments, "--force-region", *output) == 0
    answer = json.loads((tmp_path / "out" / "answer.json").read_text("utf-8"))
    assert (answer["scan"]["plane"], answer["scan"]["slices"]) == ("coronal", 24)
    assert answer["size"] == {"width": 20, "height": 6} and answer["scan"]["pixel_spacing_mm"] == [3.0, 2.0]
    labels = nibabel.load(tmp_path / "out" / "labels.nii.gz")
    assert labels.shape == (20, 24, 6) and not np.asarray(labels.dataobj)[:, :20].any()
    assert predict(tmp_path / "windowed.nii", "--plane", "sagittal", *output) == 1
    assert "plane" in capsys.readouterr().err


def test_one_slice_stands_for_a_volume_unless_several_are_asked_for(predictor: Predictor, volume: Path) -> None:
    settings = {"max_new_tokens": 4, "force_region": True}
    middle = predictor(volume, "Where?", **settings)
    assert middle.slice_index == 3 and middle.image.size == middle.scan.picture_size == (80, 24)  # of 2 x 0.5 mm
    several = predictor([volume], "Where?", slices="all", **settings)
    assert [one.slice_index for one in several] == list(range(6)) and same(several[3], middle)
    with pytest.raises(ValueError, match="chooses 6 slices"):
        predictor(volume, "Where?", slices="all", **settings)


def test_nothing_written_names_the_file_after_deidentification(
    predict: Callable, volume: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--deidentify", "--formats", "png,coco,nifti", "--force-region", "--json")
    assert predict(volume, *arguments) == 0
    captured = capsys.readouterr()
    (folder,) = (tmp_path / "here").iterdir()
    assert json.loads(captured.out)["output"] == folder.name
    written = [folder.name.encode(), *contents(folder), *contents(folder).values()]
    assert all(b"JANE" not in (text if isinstance(text, bytes) else text.encode()) for text in written)
    assert gzip.decompress((folder / "labels.nii.gz").read_bytes()).find(b"DOE") < 0
    assert predict(volume, *arguments) == 0


@pytest.mark.parametrize("kind", ["no patient", "a patient"])
def test_a_series_folder_is_one_image(kind: str, predict: Callable, tmp_path: Path, capsys) -> None:
    shared = shared_folder("data", "volumes", "tcia_sts_dicom", "image")
    options = ["--deidentify"] if kind == "no patient" else []
    formats = ("--formats", "dicom-seg", "--force-region", "--json")
    assert predict(shared, "--output", str(tmp_path / "out"), *formats, *options) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["scan"]["kind"], answer["scan"]["slices"]) == ("dicom", 35)
    import pydicom

    source = pydicom.dcmread(next(iter(sorted(shared.iterdir()))), stop_before_pixels=True)
    written = pydicom.dcmread(tmp_path / "out" / "segmentation.dcm")
    assert (str(written.PatientID) == str(source.PatientID)) == (kind == "a patient")
    assert str(source.PatientID) not in (tmp_path / "out" / "answer.json").read_text("utf-8")
