"""Small drawn data, and one whole run of all stages on them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from medsight.training.run import train
from tests.medsight.data.conftest import draw_picture, manifest_sets, named_sets, write_json
from tests.training.tiny_run import draw_data, tiny_recipe


__all__ = ["draw_picture", "manifest_sets", "named_sets", "write_json"]


@pytest.fixture(scope="session")
def drawn_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_data(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` caches out of the user's home."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets_cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def unbroken(drawn_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of all six stages; read only."""
    output = tmp_path_factory.mktemp("run") / "unbroken"
    train(tiny_recipe(drawn_data, output))
    return output
