"""A fake Hub that huggingface_hub talks to in this process, and in others through the environment."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from tests.medsight.hub.fake_hub import WRITER, FakeHub, serve


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A running, empty Hub; this process is logged in to it."""
    with serve() as running:
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        environment = {
            "HF_ENDPOINT": running.url,
            "HF_TOKEN": WRITER,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield running
