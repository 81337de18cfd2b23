"""Scans of known content, and real ones, with regions where they are bright."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsight.scans import Scan, open_scan
from tests.medsight.scans.scan_files import tiff_bytes
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
def scan(request: pytest.FixtureRequest, series: Path, nifti: Path) -> Scan:
    """The scan of the kind that a test names: of the last three, the file says nothing of a place."""
    pages = bright_volume((5, 30, 26))
    sources = {
        "series": series,
        "nifti": nifti,
        "picture": Image.fromarray(bright_volume((2, 45, 60))[1]).convert("RGB"),
        "array": pages.astype(np.int16) * BRIGHT,
        "pages": tiff_bytes([Image.fromarray(page).convert("L") for page in pages]),
    }
    return open_scan(sources[request.param])
