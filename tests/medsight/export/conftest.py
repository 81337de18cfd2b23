"""Scans of known content, and real ones, with regions where they are bright."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsight.scans import Scan, open_scan
from tests.shared import shared_folder

from .scans import BRIGHT, bright_volume, write_dicom_series, write_nifti_volume


@pytest.fixture(scope="session")
def volumes() -> Path:
    """Real scans."""
    return shared_folder("data", "volumes")


@pytest.fixture(scope="session")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an oblique CT series in no order."""
    folder = tmp_path_factory.mktemp("dicom") / "series"
    write_dicom_series(folder, bright_volume((6, 40, 32)))
    return folder


@pytest.fixture(scope="session")
def nifti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An oblique NIfTI volume whose third axis runs downwards."""
    path = tmp_path_factory.mktemp("nifti") / "volume.nii.gz"
    write_nifti_volume(path, bright_volume((21, 30, 9)))
    return path


@pytest.fixture
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(bright_volume((2, 45, 60))[1]).convert("RGB").save(path)
    return path


@pytest.fixture
def array() -> np.ndarray:
    """Slices, which say nothing of a place."""
    return bright_volume((6, 30, 26)).astype(np.int16) * BRIGHT


@pytest.fixture
def pages() -> bytes:
    """A TIFF of several pages."""
    first, *others = map(Image.fromarray, bright_volume((5, 30, 26)))
    file = BytesIO()
    first.convert("L").save(file, "TIFF", save_all=True, append_images=[page.convert("L") for page in others])
    return file.getvalue()


@pytest.fixture
def scan(request: pytest.FixtureRequest) -> Scan:
    """The scan of the fixture that a test names."""
    return open_scan(request.getfixturevalue(request.param))
