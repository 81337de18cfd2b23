"""The page over a tiny random model whose answers always cite a region code."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.medsight.scans.scan_files import picture_bytes


PICTURE = picture_bytes("PNG", size=(56, 40))


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
def session(page: Any, upload: Callable[..., str]) -> Any:
    """The session of a visitor who has opened a picture."""
    return page.open_upload(None, [upload(PICTURE, "a.png")], 0.5)[page.session]
