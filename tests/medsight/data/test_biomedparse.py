"""BiomedParse's layout: a row an image with all its masks, from file names or from a manifest."""

import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from medsight.data.pictures import read_mask, read_picture
from medsight.data.sources import Source, iterate, load_source


def read(path: Path, **settings) -> list[dict]:
    return list(load_source(Source("biomedparse", str(path), **settings)))


def errors(path: Path, **settings) -> list[str]:
    return [str(item.error) for item in iterate(Source("biomedparse", str(path), **settings)) if item.error]


def test_file_names_alone_tell_all(named_sets: Path) -> None:
    rows = read(named_sets)
    assert [Path(row["image"]["path"]).name for row in rows[:2]] == ["case_0_CT_abdomen.png", "case_1_CT_abdomen.png"]
    assert len(rows) == 6 and rows[0]["targets"] == ["left kidney", "liver"]
    assert [Path(mask["path"]).name for mask in rows[0]["masks"]][0] == "case_0_CT_abdomen_left+kidney.png"
    origin = [rows[-1][name] for name in ("dataset", "modality", "site", "split", "patient", "targets")]
    assert origin == ["hc", "ultrasound", "fetal head", "train", "hc:7", ["fetal head"]]
    assert [row["patient"] for row in read(named_sets, split="test")] == ["amos:case_5"]
    size = read_picture(rows[0]["image"]).size
    assert read_mask(rows[0]["masks"][0], size).sum() == 30


def test_patients_may_be_numbered_from_0(manifest_sets: Path) -> None:
    manifest = next(manifest_sets.rglob("manifest.jsonl"))
    records = [json.loads(line) | {"group": 0} for line in manifest.read_text("utf-8").splitlines()]
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    assert {row["patient"] for row in read(manifest_sets)} == {"0"}


def test_a_set_alone_is_read_like_a_folder_of_sets(named_sets: Path, manifest_sets: Path) -> None:
    for folder, name in ((named_sets, "amos"), (manifest_sets, "torso")):
        assert read(folder / name) == [row for row in read(folder) if row["dataset"] == name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("amos/train_mask/case_9_CT_abdomen_liver.png", "case_9_CT_abdomen_liver.png: a mask without an image"),
        ("amos/train_mask/case_1_CT_abdomen.png", "case_1_CT_abdomen.png: a mask without an image"),
        ("amos/train/scan.png", "scan.png: expected a name such as ID_MODALITY_SITE.png"),
        ("amos/train/case_1_CT_abdomen.jpg", "case_1_CT_abdomen.*same name"),
        ("amos/validation/case_8_CT_abdomen.png", "amos/validation: expected two folders, SPLIT .* and SPLIT_mask"),
        ("amos/test_masks/case_8_CT_abdomen_liver.png", "amos/test_masks: expected two folders"),
    ],
)
def test_a_file_that_fits_nowhere_is_named(
    named_sets: Path, draw_picture: Callable[..., Path], name: str, message: str
) -> None:
    draw_picture(named_sets / name)
    (found,) = errors(named_sets, split=None)
    assert re.search(message, found)


def test_a_file_that_is_no_picture_is_named_and_every_picture_is_read(named_sets: Path) -> None:
    train = named_sets / "amos" / "train"
    mask = next((named_sets / "amos" / "train_mask").glob("case_0*liver.png"))
    for suffix in (".gif", ".ppm", ".JP2", ".tif", ".webp"):
        Image.open(train / "case_0_CT_abdomen.png").save(train / f"new{suffix[1:]}_CT_abdomen{suffix}")
        options = {"lossless": True} if suffix == ".webp" else {}
        Image.open(mask).convert("L").save(mask.with_name(f"new{suffix[1:]}_CT_abdomen_liver{suffix}"), **options)
    rows = [row for row in read(named_sets / "amos") if "amos:new" in row["patient"]]
    assert len(rows) == 5
    for row in rows:
        assert read_mask(row["masks"][0], read_picture(row["image"]).size).sum() == 30
    for name in ("train/volume_CT_abdomen.nii.gz", "train_mask/case_0_CT_abdomen_spleen.npy", "train/.DS_Store"):
        (named_sets / "amos" / name).write_bytes(b"x")
    found = errors(named_sets)
    assert [Path(message.partition(":")[0]).name for message in found] == [
        "volume_CT_abdomen.nii.gz",
        "case_0_CT_abdomen_spleen.npy",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names themselves")
def test_a_name_that_is_not_utf_8_is_refused(named_sets: Path) -> None:
    for folder, name in (("test", b"caf\xe9_CT_abdomen.png"), ("test_mask", b"caf\xe9_CT_abdomen_liver.png")):
        shutil.copy(named_sets / "amos/test/case_5_CT_abdomen.png", named_sets / "amos" / folder / os.fsdecode(name))
    told = errors(named_sets / "amos", split="test")
    assert len(told) == 2 and all(message.endswith("its name is not UTF-8 text: rename it") for message in told)


def test_a_manifest_gathers_the_rows_of_an_image(manifest_sets: Path) -> None:
    rows = {Path(row["image"]["path"]).name: row for row in read(manifest_sets)}
    assert len(rows) == 5 + 12
    torso = rows["a3_CT_torso.png"]
    assert Counter(torso["targets"]) == {"liver": 1, "spleen": 1} and torso["patient"] == "torso:a"
    for target, mask in zip(torso["targets"], torso["masks"], strict=True):
        assert mask["path"].endswith(f"a3_CT_torso_{target}.png") and mask["bytes"] is None
    normal = rows["0_ultrasound_breast.png"]
    assert (normal["masks"], normal["absent"], normal["finding"]) == ([], ["breast tumor"], "normal")
    assert torso["label_origin"] == "model" and normal["dataset"] == "busi"


def test_a_manifest_may_lie_elsewhere_than_its_images(manifest_sets: Path, named_sets: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    shutil.copy(manifest_sets / "manifest.jsonl", tmp_path / "lists/mine.jsonl")
    rows = read(tmp_path / "lists/mine.jsonl", images=str(manifest_sets))
    assert rows == read(manifest_sets) and all(Path(row["image"]["path"]).is_file() for row in rows)
    with pytest.raises(ValueError, match="images=.* is for a manifest"):
        read(named_sets / "amos", images=str(manifest_sets))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": None}, "line 1.*'target'"),
        ({"mask": None}, "line 1.*absent"),
        ({"absent": True}, "line 1.*mask null"),
        ({"split": "test"}, "disagree on 'split': test, train"),
        ({"absnt": True}, "line 1: the field 'absnt' is unknown, and not used: did you mean 'absent'"),
        ({"group": "torso:z"}, "disagree on 'group': torso:a, torso:z"),
        ({"orientation": "LP"}, "disagree on 'orientation': LP, None"),
        ({"absent": True, "mask": None, "target": "spleen"}, "a0_CT_torso.png: 'spleen' has a mask and is said to be"),
        ({"mask": "torso/train_mask/a0_CT_torso_spleen.png"}, "the mask .*a0_CT_torso_spleen.png is named 2 times"),
    ],
)
def test_a_bad_manifest_row_is_named(manifest_sets: Path, change: dict, message: str) -> None:
    path = manifest_sets / "manifest.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows.sort(key=lambda row: "a0_CT" not in row["image"])
    rows[0].update(change)
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (found,) = errors(manifest_sets, split=None)
    assert re.search(message, found)


def test_an_unknown_field_is_named_once_and_its_rows_are_read(manifest_sets: Path) -> None:
    path = manifest_sets / "manifest.jsonl"
    rows = [json.loads(line) | {"note": "by hand", "crop": 3} for line in path.read_text("utf-8").splitlines()]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    found = list(iterate(Source("biomedparse", str(manifest_sets), where={"note": "by hand"})))
    assert len(found) == 17 and not any(item.error for item in found)
    (warning,) = (warning for item in found for warning in item.warnings)
    assert "manifest.jsonl, line 1: the field 'crop' is unknown, and not used: did you mean 'group'" in warning


def test_an_orientation_is_read_and_one_that_is_none_is_refused(manifest_sets: Path) -> None:
    path = manifest_sets / "manifest.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    path.write_text("\n".join(json.dumps({**row, "orientation": "AI"}) for row in rows), "utf-8")
    assert {row["orientation"] for row in read(manifest_sets)} == {"AI"}
    path.write_text("\n".join(json.dumps({**row, "orientation": "axial"}) for row in rows), "utf-8")
    assert "manifest.jsonl: " in (found := errors(manifest_sets)[0]) and "'orientation' is 'axial'" in found


def test_where_asks_for_values_of_the_manifest(manifest_sets: Path) -> None:
    assert {row["finding"] for row in read(manifest_sets, where={"finding": "benign"})} == {"benign"}
    assert len(read(manifest_sets, where={"target": "liver"})[0]["masks"]) == 1


def test_a_folder_that_is_no_such_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest\.jsonl"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")
