"""`--json`: every verb prints JSON objects, a line each, and nothing else; those of evaluation are tested there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml

from tests.training.tiny_run import draw_data, only, tiny_values


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "sets"
    root.mkdir()
    return draw_data(root)


def test_data_check(verb: Callable, data: Path) -> None:
    (said,) = verb("data", "check", data, "--workers", 1)
    assert said["ok"] is True or not said["problems"]


def test_data_annotate(verb: Callable, data: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    names = json.loads((tiny_checkpoint / "config.json").read_text("utf-8"))["group_names"]
    groups = {name: [] for name in names} | {names[0]: ["*/*"]}
    (tmp_path / "groups.yaml").write_text(yaml.safe_dump(groups))
    arguments = ["--model", tiny_checkpoint, "--output", tmp_path / "out", "--groups", tmp_path / "groups.yaml"]
    (said,) = verb("data", "annotate", data, *arguments, "--per-image", 1, "--device", "cpu")
    assert said["conversations"] == said["images"] > 0 and (tmp_path / "out").is_dir()


def test_train(verb: Callable, data: Path, tmp_path: Path) -> None:
    values = tiny_values(data, tmp_path / "run", stages={**only("perceiver"), "perceiver": {"max_steps": 1}})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    (planned,) = verb("train", tmp_path / "recipe.yaml", "--plan")
    assert planned["devices"] == 1 and [stage["name"] for stage in planned["stages"]] == ["perceiver"]
    (trained,) = verb("train", tmp_path / "recipe.yaml")
    assert Path(trained["folder"]).is_dir()


def test_push(verb: Callable, tiny_checkpoint: Path) -> None:
    (said,) = verb("push", tiny_checkpoint, "--repo-id", "me/tiny", "--dry-run")
    assert {"README.md", "config.json", "model.safetensors"} <= said["files"].keys() and said["url"] is None


def test_convert(verb: Callable, published: Any, tmp_path: Path) -> None:
    loose = {f"--{kind.replace('_', '-')}": path for kind, path in published.loose().items()}
    options = [part for pair in loose.items() for part in pair]
    (said,) = verb("convert", "--llm", published.llm, *options, "--output", tmp_path / "out")
    assert said["folder"] == str(tmp_path / "out") and (said["groups"], said["codes_per_group"]) == (3, 4)


def test_app(verb: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    application = MagicMock(local_url="http://127.0.0.1:7860/")
    monkeypatch.setattr("medsight.app.launch", lambda *args, block, **settings: application, raising=False)
    assert verb("app", "--port", 0) == [{"url": application.local_url}] and application.close.called
