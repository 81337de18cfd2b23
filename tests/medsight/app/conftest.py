"""The page over a tiny random model whose answers always cite a region code."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def tiny_predictor(tiny_checkpoint: Path) -> Any:
    from medsight.inference.predictor import Predictor

    return Predictor(tiny_checkpoint, device="cpu")


@pytest.fixture
def page(tiny_predictor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("gradio", reason="the page needs gradio (pip install 'medsight[app]')")
    from medsight.app import page as module

    monkeypatch.setattr(module, "AnswerSettings", partial(module.AnswerSettings, force_region=True))
    (tmp_path / "sessions").mkdir()
    return module.Page(tiny_predictor, tmp_path / "sessions")


@pytest.fixture
def upload(tmp_path: Path) -> Callable[..., str]:
    """Writes a file where Gradio puts uploads: in a folder of its own, under the name that the visitor gave."""

    def write(content: bytes, name: str) -> str:
        folder = tmp_path / "uploads" / f"{len(list(tmp_path.glob('uploads/*')))}"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


@pytest.fixture
def session(page: Any, upload: Callable[..., str], picture_file: bytes) -> Any:
    """The session of a visitor who has opened a picture."""
    return page.open_upload(None, [upload(picture_file, "a.png")], 0.5)[page.session]


@pytest.fixture
def picture_file() -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def volume_file() -> bytes:
    """A NIfTI volume of four slices."""
    nibabel = pytest.importorskip("nibabel")
    voxels = np.random.default_rng(0).integers(0, 900, (20, 24, 4), dtype=np.int16)
    return nibabel.Nifti1Image(voxels, np.diag([-2.0, -2.0, 5.0, 1.0])).to_bytes()
