"""Checkpoint folders that `medsight predict` and `Predictor` take, and those that they refuse by name."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medsight import Predictor, checkpoint
from medsight.checkpoint import check_checkpoint, checkpoint_sha256
from medsight.loading import choose_device


def shorten(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def add_region_queries(config: Path) -> None:
    config.write_text(config.read_text("utf-8").replace('"num_region_queries": ', '"num_region_queries": 1'))


# What is wrong with a copy of a checkpoint, and what the error names.
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "does not exist"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.touch()), "is a file"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "broken config": (lambda folder: shorten(folder / "config.json", 50), "config.json"),
    "another model": (lambda folder: (folder / "config.json").write_text('{"model_type": "llava"}'), "llava"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "pickled weights": (lambda folder: (folder / "model.safetensors").rename(folder / "old.bin"), "old.bin"),
    "truncated weights": (lambda folder: shorten(folder / "model.safetensors", -100), "model.safetensors"),
    "weights of another size": (lambda folder: add_region_queries(folder / "config.json"), "region_queries"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "tokenizer"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_bad_model_folder_is_named_and_nothing_is_written(
    kind: str,
    predict: Callable,
    tiny_checkpoint: Path,
    image_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage, culprit = DAMAGES[kind]
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    damage(model)
    assert predict(image_file, "--output", str(tmp_path / "out"), model=model) == 1
    error = capsys.readouterr().err
    assert error.startswith("medsight: error: ") and error.count("\n") == 1
    assert str(model) in error and culprit in error
    assert not (tmp_path / "out").exists()


@pytest.fixture
def sharded(tiny_checkpoint: Path, predictor: Predictor, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    predictor.model.save_pretrained(folder, max_shard_size="50KB")
    predictor.processor.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_a_sharded_checkpoint_answers_like_the_whole_one(
    sharded: Path, predictor: Predictor, image_file: Path
) -> None:
    one, other = (
        model(image_file, "Where?", max_new_tokens=6, force_region=True)
        for model in (predictor, Predictor(sharded, device="cpu"))
    )
    assert one.answer.raw_text == other.answer.raw_text


def test_missing_shards_are_all_named_and_nothing_is_written(
    sharded: Path, predict: Callable, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = sorted(sharded.glob("model-*.safetensors"))[1:3]
    for path in gone:
        path.unlink()
    assert predict(image_file, "--output", str(tmp_path / "out"), model=sharded) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(path.name in error for path in gone) and str(sharded) in error
    assert not (tmp_path / "out").exists()


def test_a_shard_of_another_save_is_noticed(sharded: Path) -> None:
    one, other = sorted(sharded.glob("model-*.safetensors"))[:2]
    shutil.copy(one, other)
    with pytest.raises(ValueError, match=other.name):
        check_checkpoint(sharded)


def test_the_model_is_loaded_without_running_the_folders_code(
    tiny_checkpoint: Path, image_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('code of a checkpoint folder ran')\n")
    prediction = Predictor(folder, device="cpu")(image_file, "Where?", max_new_tokens=4, force_region=True)
    assert prediction.answer.regions


def test_other_files_in_the_folder_do_not_make_it_another_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    before = checkpoint_sha256(folder)
    (folder / "metrics.json").write_text("{}")
    assert checkpoint_sha256(folder) == before
    config = folder / "config.json"
    config.write_text(config.read_text("utf-8") + "\n")
    assert checkpoint_sha256(folder) != before


def test_a_large_checkpoint_is_read_again_only_when_it_has_changed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "HF_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    small = checkpoint_sha256(folder)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(checkpoint, "REMEMBERED_FROM", 0)
    assert checkpoint_sha256(folder) == small
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sha256_of", lambda files: "read again")
        assert checkpoint_sha256(folder) == small
    time.sleep(0.05)  # file systems count time in steps
    config = folder / "config.json"
    times = config.stat()
    config.write_text(config.read_text("utf-8").replace("medsight", "MEDSIGHT", 1))
    os.utime(config, ns=(times.st_atime_ns, times.st_mtime_ns))  # of the same size, and as old
    assert checkpoint_sha256(folder) != small


@pytest.mark.parametrize("device", ["gpu", "xpu:3", "cuda:4096", "mps"])
def test_a_device_that_is_not_there_is_refused_by_name(device: str) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ValueError, match=f"device '{device}'"):
        choose_device(device)
