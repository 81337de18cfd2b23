"""Fixtures that all tests share."""

from pathlib import Path

import pytest

from tests.tiny_checkpoint import save_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and its processor; read only."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
