"""Folders to publish, and a fake Hub: huggingface_hub talks to it here and, by the environment, in other processes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

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


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, where a training run would leave it."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "run" / "model"))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter as peft saves it, with a path of this machine in it and a card that says nothing."""
    path = tmp_path / "adapter"
    path.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path), "r": 8}
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({"base_model.model.lora_A.weight": torch.ones(2, 2)}, path / "adapter_model.safetensors")
    (path / "README.md").write_text("---\nlibrary_name: peft\n---\n[More Information Needed]\n", encoding="utf-8")
    return path
