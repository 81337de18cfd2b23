"""Which images the arguments of a command name."""

from pathlib import Path

import numpy as np
import pytest

from medsight.image_files import find_images
from tests.medsight.export.scans import write_dicom_series


@pytest.mark.parametrize("series", [None, ""], ids=["named", "without a name"])
def test_a_folder_of_slices_in_space_is_one_image(series: str | None, tmp_path: Path) -> None:
    folder, changes = tmp_path / "study", {} if series is None else {"SeriesInstanceUID": series}
    write_dicom_series(folder, np.ones((4, 8, 8), bool), **changes)
    found = find_images([str(folder)])
    assert found.images == [folder] and found.is_single


def test_dicom_pictures_without_series_and_place_are_images_each(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    files = write_dicom_series(folder, np.ones((4, 8, 8), bool), SeriesInstanceUID="", ImagePositionPatient=None)
    assert find_images([str(folder)]).images == sorted(files)
