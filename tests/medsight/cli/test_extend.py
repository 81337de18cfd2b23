"""`medsight extend` and `medsight data check --extend`: what they say of names that data and model do not share."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from medsight.cli import main
from medsight.cli.data_options import pairs
from tests.tiny_checkpoint import save_tiny_checkpoint
from tests.training.tiny_run import draw_data


KNOWN = {
    "num_mask_classes": 2,
    "mask_class_names": ["left ventricle", "benign breast tumor"],
    "num_groups": 2,
    "group_names": ["MRI heart", "ultrasound breast"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("known") / "model", **KNOWN)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hearts and breasts, which the model knows, and kidneys and livers in a torso."""
    return draw_data(tmp_path_factory.mktemp("drawn"))


def test_what_is_renamed_is_not_new(model: Path, data: Path, tmp_path: Path, verb: Callable) -> None:
    output = tmp_path / "out"
    (content,) = verb("extend", model, "--data", data, "--output", output, "--rename", "liver=left ventricle")
    assert content["added"] == {"classes": ["left kidney"], "groups": {"CT torso": ["CT/torso"]}}
    config = AutoConfig.from_pretrained(output)
    assert config.mask_class_names == [*KNOWN["mask_class_names"], "left kidney"]
    assert config.group_orientations == {"CT torso": "LP"}


def test_the_report_says_what_would_be_added(
    model: Path, data: Path, tmp_path: Path, verb: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    check = ["data", "check", str(data), "--model", str(model), "--workers", "1"]
    (report,) = verb(*check, "--extend")
    assert report["ok"] and report["additions"] == [
        "2 mask classes: left kidney, liver",
        "1 code group: CT torso, with codes [C2_0] to [C2_3]",
    ]
    assert main(check) == 1
    said = capsys.readouterr().out
    assert "unknown modality or site: " in said and "no code group of the model is called 'CT torso'" in said
    assert "'liver' is none of the 2 targets" in said
    groups = tmp_path / "groups.yaml"
    groups.write_text("MRI heart: ['CT/*']", encoding="utf-8")
    (report,) = verb(*check, "--extend", "--groups", groups, "--rename", "liver=left ventricle")
    assert report["additions"] == ["1 mask class: left kidney"]
    assert main([*check, "--extend", "--rename", "liver=Left  Ventricle"]) == 1
    assert "'Left  Ventricle' is 'left ventricle' but for case and spaces" in capsys.readouterr().out
    assert main(["data", "check", str(data), "--extend"]) == 1
    assert "--extend and --groups are about a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("renames", [["liver"], ["=liver"], ["liver="], ["a=b", "a=c"]])
def test_a_rename_that_is_none_is_refused(renames: list[str]) -> None:
    with pytest.raises(ValueError, match="expected OLD=NEW, and each OLD once"):
        pairs("--rename", renames)
    assert pairs("--rename", ["optic nerve head = optic disc"]) == {"optic nerve head": "optic disc"}


def test_a_taken_folder_is_told_before_anything_is_read(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "data.jsonl").touch()
    arguments = ["--data", str(tmp_path), "--layout", "biomedparse", "--output", str(tmp_path / "file")]
    assert main(["extend", str(model), *arguments]) == 1
    assert "file is a file; name a folder" in capsys.readouterr().err
