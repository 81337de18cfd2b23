"""`medsight data guess`, `check` and `convert`: what they print, write and refuse; who takes an entry."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from medsight.cli import main
from tests.medsight.data.layouts.picture_sets import NAMES, ORIGIN, examples, save
from tests.medsight.data.layouts.test_pairs import FOLDERS, MAPS
from tests.medsight.data.layouts.test_table import records, write
from tests.training.tiny_run import only, tiny_values


ABOUT = ["--modality", ORIGIN["modality"], "--site", ORIGIN["site"], "--patient", r"^(p\d)_"]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    FOLDERS["a folder a class below"](tmp_path / "scans")
    return tmp_path / "scans"


def test_guess_writes_an_entry_and_a_sheet(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry, sheet = tmp_path / "scans.yaml", tmp_path / "sheet.png"
    arguments = ["data", "guess", str(folders), *ABOUT, "--rename", "liver=hepar"]
    assert main([*arguments, "--output", str(entry), "--sheet", str(sheet)]) == 0
    printed = capsys.readouterr().out
    assert "layout    pairs" in printed and "hepar" in printed and f"Written to {entry}" in printed
    assert yaml.safe_load(entry.read_text()) == {
        "layout": "pairs",
        "path": str(folders),
        **ORIGIN,
        "patient": r"^(p\d)_",
        "rename": {"liver": "hepar"},
    }
    assert min(Image.open(sheet).size) > 500
    before = entry.read_bytes(), sheet.read_bytes()
    for option, file in (("--output", entry), ("--sheet", sheet)):
        assert main([*arguments, option, str(file)]) == 1
        assert f"{file} is there already" in capsys.readouterr().err
    assert (entry.read_bytes(), sheet.read_bytes()) == before
    assert main([*arguments, "--output", str(entry), "--sheet", str(sheet), "--overwrite"]) == 0


def test_guess_says_what_has_to_be_filled_in(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "guess", str(folders)]) == 0
    printed = capsys.readouterr().out
    assert "to fill in" in printed and "# site: say the part of the body" in printed and "modality: null" in printed


def test_guess_takes_names_and_columns(verb: Callable[..., Any], tmp_path: Path) -> None:
    MAPS["numbers"][0](tmp_path / "maps")
    (tmp_path / "names.txt").write_text("\n".join(f"{value} {name}" for value, name in NAMES.items()))
    (said,) = verb("data", "guess", tmp_path / "maps", *ABOUT, "--names", tmp_path / "names.txt")
    assert said["missing"] == {} and said["targets"]["liver"] == {"train": 4, "test": 1}
    (tmp_path / "colours.json").write_text(
        '{"liver": "#FF0000", "left kidney": [0, 255, 0], "liver tumor": "0 16 255"}'
    )
    MAPS["colours"][0](tmp_path / "coloured")
    entry = tmp_path / "coloured.yaml"
    verb("data", "guess", tmp_path / "coloured", *ABOUT, "--names", tmp_path / "colours.json", "--output", entry)
    (said,) = verb("data", "check", entry)
    assert said["targets"]["liver tumor"] == {"train": 1}
    (tmp_path / "table").mkdir()
    renamed = [{"Bild": row.pop("image"), "Maske": row.pop("mask"), **row} for row in records(tmp_path / "table")]
    write(tmp_path / "table/a.csv", renamed)
    columns = ["--layout", "table", "--columns", "image=Bild,mask=Maske"]
    (said,) = verb("data", "guess", tmp_path / "table", *columns)
    assert said["entry"]["columns"] == {"image": "Bild", "mask": "Maske"} and said["targets"]["liver"]["train"] == 4


def test_renaming_is_checked_and_converted(verb: Callable[..., Any], tmp_path: Path) -> None:
    root = tmp_path / "table"
    root.mkdir()
    write(root / "a.csv", records(root))
    renamed = ["--rename", "liver=hepar", "--rename", "left kidney=kidney"]
    (checked,) = verb("data", "check", root / "a.csv", *renamed)
    (packed,) = verb("data", "convert", root / "a.csv", *renamed, "--output", tmp_path / "packed")
    (again,) = verb("data", "check", tmp_path / "packed")
    assert set(checked["targets"]) == set(packed["targets"]) == set(again["targets"])
    assert set(again["targets"]) == {"hepar", "kidney", "liver tumor"}
    assert packed["folder"] == str(tmp_path / "packed")
    (test,) = verb("data", "convert", root / "a.csv", "--split", "test", "--output", tmp_path / "test")
    assert test["rows"] == {"test": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["guess", "{}", "--rename", "liver"], "--rename 'liver': expected OLD=NEW"),
        (["check", "{}", "--rename", "=x"], "--rename '=x': expected OLD=NEW"),
        (["guess", "{}", "--columns", "image=a"], "unknown key 'columns'"),
        (["guess", "{}", "--output", "entry.json"], "expected the name of a .yaml file"),
        (["convert", "{}", "--output", "{}"], "is not empty"),
    ],
)
def test_wrong_usage_is_named(
    folders: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", *(part.format(folders) for part in arguments)]) == 1
    assert message in capsys.readouterr().err


def test_an_entry_is_taken_by_all_that_read_data(
    verb: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text("utf-8"))
    for each in examples():
        save(tmp_path / "scans" / each.split / "images" / f"{each.stem}.png", each.pixels)
        save(tmp_path / "scans" / each.split / "masks" / f"{each.stem}.png", each.labels > 0)
    entry = tmp_path / "scans.yaml"
    monkeypatch.chdir(tmp_path)
    verb("data", "guess", "scans", *ABOUT[:4], "--structure", "liver", "--output", entry)
    (checked,) = verb("data", "check", entry)
    assert checked["ok"] and checked["images"] == {"train": 6, "test": 1}
    groups = {group: [] for group in config["group_names"]} | {config["group_names"][0]: ["*/*"]}
    (tmp_path / "groups.yaml").write_text(yaml.safe_dump(groups))
    model = ["--model", tiny_checkpoint, "--device", "cpu"]
    (said,) = verb("data", "annotate", entry, *model, "--groups", "groups.yaml", "--per-image", 1, "--output", "said")
    assert said["images"] == 6
    (scored,) = verb("evaluate", "--benchmark", "segmentation", "--data", entry, *model, "--output", "scores")
    assert scored
    source = yaml.safe_load(entry.read_text())
    values = tiny_values(tmp_path, tmp_path / "run", stages={**only("perceiver"), "perceiver": {"max_steps": 1}})
    values["data"]["regions"] = [source]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    (planned,) = verb("train", "recipe.yaml", "--plan")
    assert [stage["name"] for stage in planned["stages"]] == ["perceiver"]
