"""What stops a training run: bad items, losses that are not finite, a full disk. Nothing good is lost."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configuration_medsight import MedSightConfig
from medsight.training.corpus import read_corpus
from medsight.training.plan import stage_plans
from medsight.training.run import train
from medsight.training.trainer import NotFiniteError, StageTrainer, checkpoints
from tests.training.tiny_run import only, steps_of, tiny_recipe


@pytest.fixture
def data(drawn_data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(drawn_data, tmp_path / "data")


def perceiver(data: Path, output: Path, /, **changes: Any) -> Any:
    return tiny_recipe(data, output, stages=only("perceiver"), **changes)


def broken_mask(data: Path) -> Path:
    path = data / "totalsegmentator/train_mask/1_CT_torso_liver.png"
    Image.fromarray(np.ones((9, 9), dtype=bool)).save(path)
    return path


def broken_image(data: Path) -> Path:
    path = data / "busi/train/2_ultrasound_breast.png"
    path.write_bytes(path.read_bytes()[:60])
    return path


def empty_mask(data: Path) -> Path:
    path = data / "sunnybrook/train_mask/3_MRI-cine_heart_left+ventricle.png"
    Image.fromarray(np.zeros((24, 32), dtype=bool)).save(path)
    return path


def missing_image(data: Path) -> Path:
    path = data / "sunnybrook/train/4_MRI-cine_heart.png"
    path.unlink()
    return path


BREAKS = (broken_mask, broken_image, empty_mask, missing_image)


@pytest.mark.parametrize("spoil", BREAKS, ids=lambda spoil: spoil.__name__)
def test_training_stops_at_a_bad_item_and_names_the_file(data: Path, tmp_path: Path, spoil: Any) -> None:
    path = spoil(data)
    with pytest.raises((OSError, ValueError), match=path.name.replace("+", r"\+")):
        train(perceiver(data, tmp_path / "run", data={"validation_fraction": 0}))


def test_bad_items_are_left_out_counted_and_logged_on_request(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [spoil(data) for spoil in BREAKS]
    recipe = perceiver(data, tmp_path / "run", data={"validation_fraction": 0, "on_error": "skip"})
    train(recipe)
    assert len(steps_of(tmp_path / "run", "perceiver")) == 6
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(told) >= 4
    for path in paths:
        assert any(path.name in message for message in told)


def test_an_image_with_nan_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    pixels = np.zeros((24, 32), dtype=np.float32)
    pixels[3, 3] = np.nan
    folder = data / "nan"
    (folder / "train").mkdir(parents=True)
    (folder / "train_mask").mkdir()
    Image.fromarray(pixels).save(folder / "train/9_CT_torso.tiff")
    mask = np.zeros((24, 32), dtype=bool)
    mask[:5] = True
    Image.fromarray(mask).save(folder / "train_mask/9_CT_torso_liver.png")
    lines = (data / "manifest.jsonl").read_text("utf-8")
    row = (
        '{"image": "nan/train/9_CT_torso.tiff", "mask": "nan/train_mask/9_CT_torso_liver.png", "modality": "CT", '
        '"site": "torso", "target": "liver", "split": "train", "group": "nan:9"}'
    )
    (data / "manifest.jsonl").write_text(lines + "\n" + row, encoding="utf-8")
    with pytest.raises(ValueError, match=r"9_CT_torso\.tiff"):
        train(perceiver(data, tmp_path / "run", data={"validation_fraction": 0}))


def test_a_loss_that_is_not_finite_stops_with_the_files_and_leaves_the_last_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = StageTrainer.training_step

    def poisoned(self: StageTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            inputs["pixel_values"][0, 0, 0, 0] = float("inf")
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", poisoned)
    with pytest.raises(NotFiniteError, match=r"perceiver, step 5: the loss is nan.*\.png"):
        train(perceiver(data, tmp_path / "run"))
    folder = tmp_path / "run" / "stages" / "perceiver"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    monkeypatch.setattr(StageTrainer, "training_step", step)
    train(perceiver(data, tmp_path / "run"))
    assert (folder / "finished.json").is_file()


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-4" in str(file):
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        save(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint-4 could not be written .*No space left"):
        train(perceiver(data, tmp_path / "run"))
    folder = tmp_path / "run" / "stages" / "perceiver"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    assert not list(folder.glob(".saving*"))
    monkeypatch.undo()
    train(perceiver(data, tmp_path / "run"))
    train(perceiver(data, tmp_path / "other"))
    assert steps_of(tmp_path / "run", "perceiver") == steps_of(tmp_path / "other", "perceiver")


def test_a_conversation_that_is_too_long_is_named_and_not_cut(data: Path, tmp_path: Path) -> None:
    changes = {"vision_to_text": {"data": ["plain"], "max_length": 40}}
    recipe = tiny_recipe(data, tmp_path / "run", stages={**only("vision_to_text"), **changes})
    with pytest.raises(ValueError, match=r"\.png: the conversation has \d+ tokens, more than max_length=40"):
        train(recipe)


def test_too_long_conversations_are_left_out_on_request_however_a_step_is_cut(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A micro-batch of nothing else counts for nothing; what other processes left out is counted, too."""
    logs: list[dict[str, float]] = []
    log = StageTrainer.log

    def told(self: StageTrainer, values: dict[str, float], *args: Any, **kwargs: Any) -> None:
        log(self, values, *args, **kwargs)
        logs.append(values)

    monkeypatch.setattr(StageTrainer, "log", told)
    common = {"data": ["plain"], "max_length": 122, "augment": False}
    steps = []
    for size, pieces, workers in ((2, 1, 0), (1, 2, 1)):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": pieces}
        stage = {**common, **cut, "dataloader_num_workers": workers}
        recipe = tiny_recipe(
            data,
            tmp_path / f"run-{size}",
            stages={**only("vision_to_text"), "vision_to_text": stage},
            data={"on_error": "skip", "validation_fraction": 0},
        )
        train(recipe)
        steps.append([step["loss"] for step in steps_of(tmp_path / f"run-{size}", "vision_to_text")])
        assert max(values.get("skipped_items", 0) for values in logs) > 0
        logs.clear()
    assert len(steps[0]) == 6 and 0.0 in steps[0] and max(steps[0]) > 1  # a step may be of nothing else, too
    assert steps[1] == pytest.approx(steps[0], rel=1e-4)


def test_a_stage_of_broken_items_alone_says_so(data: Path, tmp_path: Path) -> None:
    stages = {**only("vision_to_text"), "vision_to_text": {"max_length": 9, "start_at_word_scale": False}}
    with pytest.raises(ValueError, match=r"vision_to_text: every sample is broken; the last: .*max_length=9"):
        train(tiny_recipe(data, tmp_path / "run", stages=stages, data={"on_error": "skip"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"regions": []}}, "data.regions is empty"),
        ({"data": {"groups": {"CT": ["CT/*"]}}}, "no code group matches"),
        ({"data": {"classes": ["liver"]}}, "is none of the model's 1 mask classes"),
        ({"stages": {"vision_to_text": {"lr_scheduler_type": "cosin"}}}, "cosin is not a valid SchedulerType"),
        (
            {
                "stages": {"vision_to_text": {"data": ["plain", "lab"]}},
                "data": {"conversations": {"lab": {"layout": "llava", "path": "/no/such/lab.json"}}},
            },
            "/no/such/lab.json: no such file",
        ),
        ({"stages": {"vision_to_text": {"trainer": "sft", "loss_type": "dft"}}}, "loss_type is set by the run itself"),
        ({"model": {"preset": "tyni"}}, "preset='tyni': choose one of"),
        ({"model": {"config": {"num_querys": 3}}}, "num_querys"),
        ({"augmentation": {"rotation": 3}}, "unknown key 'rotation'; did you mean 'rotate'"),
    ],
)
def test_a_recipe_that_does_not_fit_its_data_is_told_so(
    data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    stages = {**only("perceiver", "vision_to_text"), **changes.pop("stages", {})}
    with pytest.raises((OSError, TypeError, ValueError), match=message):
        train(tiny_recipe(data, tmp_path / "run", stages=stages, **changes))
    assert not [*tmp_path.glob("run/stages/*/finished.json")]  # before any stage has trained for nothing


def test_groups_are_those_of_the_folder_in_any_order_and_unknown_ones_are_refused(
    drawn_data: Path, unbroken: Path, tmp_path: Path
) -> None:
    start = unbroken / "model"
    names = MedSightConfig.from_pretrained(start).group_names
    swapped = {"groups": {name: [name.replace(" ", "/")] for name in reversed(names)}}
    for data in ({}, swapped, {"groups": {names[1]: ["CT/*"]}}):
        own = perceiver(drawn_data, tmp_path / "own", model={"folder": str(start)}, data=data)
        assert read_corpus(own).groups.names == names
    unknown = {"groups": {"CT torsos": ["CT/*"]}}
    with pytest.raises(ValueError, match="no code group 'CT torsos': did you mean 'CT torso'.*model.extend: true"):
        train(perceiver(drawn_data, tmp_path / "unknown", model={"folder": str(start)}, data=unknown))
    with pytest.raises(ValueError, match="no code group 'CT torsos': did you mean 'CT torso'"):
        stage_plans(perceiver(drawn_data, tmp_path / "unknown", model={"folder": str(start)}, data=unknown), 1)


def test_a_model_remembers_what_its_groups_hold(drawn_data: Path, tmp_path: Path) -> None:
    groups = {"scans": ["CT/*", "MRI*/*"], "echo": ["ultrasound/breast"]}
    train(perceiver(drawn_data, tmp_path / "first", data={"groups": groups}))
    start = tmp_path / "first" / "model"
    assert MedSightConfig.from_pretrained(start).group_patterns == groups
    again = perceiver(drawn_data, tmp_path / "again", model={"folder": str(start)})
    found = read_corpus(again).groups
    assert found.names == list(groups)
    assert [found.index("MRI-cine", "heart"), found.index("ultrasound", "breast")] == [0, 1]
