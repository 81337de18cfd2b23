"""Where real images, masks and volumes lie, which the repository does not hold."""

import os
from pathlib import Path

import pytest


# In the folder that MEDSIGHT_SHARED names, or in one beside the repository.
SHARED = Path(os.environ.get("MEDSIGHT_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def shared_folder(*names: str) -> Path:
    """A folder in `SHARED`; where there is none, the test is skipped."""
    folder = SHARED.joinpath(*names)
    if not folder.is_dir():
        pytest.skip(f"real images are not here: there is no folder {folder} (MEDSIGHT_SHARED names another)")
    return folder
