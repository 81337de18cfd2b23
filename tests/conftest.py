"""Fixtures that all tests share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import modeling_medsight
import processing_medsight
from configuration_medsight.remote_code_medsight import write_remote_code
from medsight import cli
from tests.shared import shared_folder
from tests.tiny_checkpoint import save_tiny_checkpoint


NANO = Path(__file__).resolve().parents[1] / "medsight" / "medsight-nano"


def pytest_configure(config: pytest.Config) -> None:
    """medsight-nano's code is not in git, and may be older here than what it is a copy of: it is written anew."""
    if not hasattr(config, "workerinput"):  # of several processes, the first one does it
        write_remote_code(NANO, *modeling_medsight.__path__, *processing_medsight.__path__)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and its processor; read only."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images and masks."""
    return shared_folder("data")


@pytest.fixture
def verb(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, Any]]]:
    """Runs a verb with --json; the objects that it printed."""

    def run(*arguments: object) -> list[dict[str, Any]]:
        capsys.readouterr()
        status = cli.main([*map(str, arguments), "--json"])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return [json.loads(line) for line in captured.out.splitlines()]

    return run
