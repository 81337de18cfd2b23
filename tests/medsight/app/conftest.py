"""The page over a tiny random model whose answers always cite a region code."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.medsight.scans.scan_files import picture_bytes


SECRET = "Doe^Jane 1970-01-01.png"
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
def upload(page: Any, tmp_path: Path) -> Callable[..., tuple[Any, dict[Any, Any]]]:
    """Uploads files, each from a folder of its own as Gradio does, under a patient's name.

    The session afterwards, and what the page shows.
    """

    def run(*contents: bytes, session: Any = None, onto: Any = page) -> tuple[Any, dict[Any, Any]]:
        files = [Path(tempfile.mkdtemp(dir=tmp_path)) / SECRET for _ in contents]
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        updates = onto.open_upload(session, list(map(str, files)), 0.5)
        return updates.get(onto.session), updates

    return run


@pytest.fixture
def session(upload: Callable[..., Any]) -> Any:
    """The session of a visitor who has opened a picture."""
    return upload(PICTURE)[0]
