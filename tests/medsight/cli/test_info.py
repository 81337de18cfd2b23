"""`medsight info`: what it says of checkpoints, adapters and images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from medsight import Predictor, cli


@pytest.fixture
def info(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(*arguments: object) -> dict[str, Any]:
        assert cli.main(["info", *map(str, arguments), "--json"]) == 0
        content: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert cli.main(["info", *map(str, arguments)]) == 0
        assert content["kind"] in capsys.readouterr().out
        return content

    return run


def test_a_checkpoint_is_counted_as_its_model_is(info: Callable, tiny_checkpoint: Path) -> None:
    model = Predictor(tiny_checkpoint, device="cpu").model
    said = info(tiny_checkpoint)
    assert said["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert sum(said["parameters_by_part"].values()) == said["parameters"]
    assert said["groups"] == model.config.num_groups and said["group_names"] == list(model.config.group_names)
    assert said["dtypes"] == ["F32"] and said["bytes"] == (tiny_checkpoint / "model.safetensors").stat().st_size
    assert said["stages_trained"] is None and said["codes"] == {} and said["transformers_version"]


def test_what_codes_usually_stand_for_is_listed(
    info: Callable, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    codes = {"[C0_1]": {"group": "CT torso", "n": 4, "structures": {"liver": 0.75, "spleen": 0.25}}}
    (folder / "region_codes.json").write_text(json.dumps({"codes": codes}))
    assert info(folder)["codes"] == codes
    cli.main(["info", str(folder)])
    assert "[C0_1]  CT torso  liver 75%, spleen 25%" in capsys.readouterr().out


def test_the_stages_of_a_run_are_those_that_are_finished(
    info: Callable, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    stages = ["perceiver", "codebook", "unified"]
    recipe = {"stages": [{"name": stage, "kind": "regions"} for stage in [*stages, "ahead"]]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    for stage in stages:
        (tmp_path / "stages" / stage).mkdir(parents=True)
        (tmp_path / "stages" / stage / "finished.json").touch()
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    shutil.copytree(tiny_checkpoint, tmp_path / "stages" / "codebook" / "model")
    assert info(tmp_path / "model")["stages_trained"] == stages
    assert info(tmp_path / "stages" / "codebook" / "model")["stages_trained"] == stages[:2]


def test_an_adapter_names_its_base_model(info: Callable, tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "somebody/medsight", "peft_type": "LORA", "r": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {"a": np.zeros((4, 3), np.float32), "b": np.zeros((2, 4), np.float32)}, tmp_path / "adapter_model.safetensors"
    )
    said = info(tmp_path)
    assert (said["kind"], said["base_model"]) == ("adapter", "somebody/medsight")
    assert (said["rank"], said["parameters"]) == (4, 20)


def test_an_image_has_a_size_and_what_spacing_its_file_states_and_no_patient(
    info: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (7, 5)).save(tmp_path / "x.png")
    said = info(tmp_path / "x.png")
    assert (said["kind"], said["slices"], said["width"], said["height"]) == ("image", 1, 7, 5)
    assert said["window_of_its_own"] is False
    assert said["pixel_spacing_mm"] is None and said["bytes"] == (tmp_path / "x.png").stat().st_size
    pydicom = pytest.importorskip("pydicom")
    source = pydicom.examples.ct
    source.PatientName, source.PatientID = "Doe^Jane", "ID4711"
    source.save_as(tmp_path / "ct.dcm")
    said = info(tmp_path / "ct.dcm")
    assert said["window_of_its_own"] == ("WindowCenter" in source)
    assert (said["kind"], said["modality"]) == ("dicom", "CT") and len(said["pixel_spacing_mm"]) == 2
    cli.main(["info", str(tmp_path / "ct.dcm")])
    assert not any(secret in str(said) + capsys.readouterr().out for secret in ("Doe", "Jane", "4711"))


@pytest.mark.parametrize("name", ["nowhere", "text.txt", "empty"])
def test_what_is_neither_is_refused_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    assert cli.main(["info", str(tmp_path / name)]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / name) in error and error.count("\n") == 1
