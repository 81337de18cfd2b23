"""Fixtures of the commands' tests: a checkpoint in the published layout, a predictor, and `medsight predict`."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsight import Predictor, cli
from tests.medsight.answers import SIZE
from tests.medsight.conversion.published_files import Published, random_model, write_published


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The checkpoint, shared by all tests: change a copy (`published_copy`)."""
    folder = tmp_path_factory.mktemp("published")
    model = random_model()
    write_published(folder, model)
    return Published(folder, model)


@pytest.fixture
def published_copy(published: Published, tmp_path: Path) -> Published:
    """A copy of the checkpoint for one test to damage."""
    return Published(Path(shutil.copytree(published.folder, tmp_path / "published")), published.model)


@pytest.fixture(scope="session")
def predictor(tiny_checkpoint: Path) -> Predictor:
    return Predictor(tiny_checkpoint, device="cpu")


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    path = tmp_path / "scan.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def predict(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `medsight predict` in an empty working folder, `tmp_path / "here"`."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(image: Path, *options: str, model: Path = tiny_checkpoint) -> int:
        arguments = [str(image), "--prompt", "Segment the liver.", "--model", str(model), "--max-new-tokens", "6"]
        return cli.main(["predict", *arguments, "--device", "cpu", *options])

    return run
