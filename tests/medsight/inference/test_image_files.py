"""Which images the arguments of a command name."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsight.inference.image_files import find_images, image_content
from tests.medsight.export.scans import write_dicom_series


@pytest.mark.parametrize("series", [None, ""], ids=["named", "without a name"])
def test_a_folder_of_slices_in_space_is_one_image(series: str | None, tmp_path: Path) -> None:
    folder, changes = tmp_path / "study", {} if series is None else {"SeriesInstanceUID": series}
    write_dicom_series(folder, np.ones((4, 8, 8), bool), **changes)
    found = find_images([str(folder)])
    assert found.images == [folder] and found.is_single
    content = image_content(folder)
    for stray in (".DS_Store", "notes.txt", "DICOMDIR"):
        (folder / stray).write_text("x")
    assert image_content(folder) == content and len(content) == 4


def test_an_empty_name_is_not_the_folder_that_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name of an image is empty"):
        find_images([""])


def test_another_name_of_a_file_is_no_second_image(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / folder / "0.png")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "link.png").symlink_to(tmp_path / "a" / "0.png")
    found = find_images([str(tmp_path / name) for name in ("a", "all/*", "b", "a")])
    assert found.images == [tmp_path / "a" / "0.png", tmp_path / "b" / "0.png"]
    assert found.repeated == [tmp_path / "all" / "link.png"]


def test_dicom_pictures_without_series_and_place_are_images_each(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    files = write_dicom_series(folder, np.ones((4, 8, 8), bool), SeriesInstanceUID="", ImagePositionPatient=None)
    assert find_images([str(folder)]).images == sorted(files)


def test_folders_in_a_folder_are_named_as_left_out_or_read_by_a_pattern(tmp_path: Path) -> None:
    study, picture = tmp_path / "study", tmp_path / "study" / "picture.png"
    files = write_dicom_series(study / "series", np.ones((4, 8, 8), bool))
    with pytest.raises(ValueError, match=r"without an image: by a pattern, name the folders in it \('.*study/\*'\)"):
        find_images([str(study)])
    Image.new("L", (8, 8)).save(picture)
    found = find_images([str(study)])
    assert found.images == [picture] and found.left_out == [study / "series"]
    for pattern in ("study/*", "study/**"):
        assert find_images([str(tmp_path / pattern)]).images == [picture, study / "series"]
    assert find_images([str(study / "series"), str(files[0])]).images == [study / "series", files[0]]
