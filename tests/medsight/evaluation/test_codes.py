"""`medsight codes`: what each code stands for."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from medsight import cli
from processing_medsight import MedSightProcessor


@pytest.fixture
def checkpoint(named_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(named_checkpoint, tmp_path / "model")


def codes(checkpoint: Path, data: Path, *options: str) -> int:
    arguments = ["--model", checkpoint, "--data", data, "--split", "test", "--device", "cpu"]
    return cli.main(["codes", *map(str, arguments), *options])


def test_every_mask_is_counted_under_its_code_and_structure(
    checkpoint: Path, regions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert codes(checkpoint, regions, "--output", str(tmp_path / "sheets"), "--examples", "2") == 0
    printed = capsys.readouterr().out
    content = json.loads((checkpoint / "region_codes.json").read_text("utf-8"))
    counted: Counter[tuple[str, str]] = Counter()
    for entry in content["codes"].values():
        assert sum(entry["structures"].values()) == pytest.approx(1)
        for structure, share in entry["structures"].items():
            counted[entry["group"], structure] += round(entry["n"] * share)
    assert counted == {
        ("CT torso", "liver"): 2,
        ("CT torso", "spleen"): 2,
        ("ultrasound breast", "malignant breast tumor"): 3,
    }
    assert content["groups"]["CT torso"]["citations"] == 4 and content["images"] == 5
    assert {path.stem for path in (tmp_path / "sheets").iterdir()} == {code.strip("[]") for code in content["codes"]}
    assert "CT torso" in printed and "codes in use" in printed
    assert MedSightProcessor.from_pretrained(checkpoint).region_codes == content


def test_an_earlier_description_stays_unless_it_may_be_replaced(
    checkpoint: Path, regions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "region_codes.json"
    path.write_text('{"codes": {}}')
    assert codes(checkpoint, regions) == 1
    assert "described already; add --overwrite" in capsys.readouterr().err
    assert path.read_text() == '{"codes": {}}'
    assert codes(checkpoint, regions, "--overwrite") == 0
    assert json.loads(path.read_text())["codes"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [("mask", "the mask is 3x3 pixels"), ("group", "no code group of the model is called 'CT knee'")],
)
def test_bad_data_leave_the_checkpoint_as_it_was(
    checkpoint: Path, regions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str, message: str
) -> None:
    copied = shutil.copytree(regions, tmp_path / "copied")
    manifest = copied / "manifest.jsonl"
    if broken == "mask":
        Image.new("1", (3, 3), 1).save(next((copied / "set" / "test_mask").iterdir()))
    else:
        manifest.write_text(manifest.read_text().replace('"torso"', '"knee"'))
    assert codes(checkpoint, copied, "--output", str(tmp_path / "sheets")) == 1
    assert message in capsys.readouterr().err
    assert not (checkpoint / "region_codes.json").exists() and not (tmp_path / "sheets").exists()
