"""`medsight data check`: everything is read once, every problem is reported with its file, and the status says it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from medsight.cli import main
from medsight.data.check import Report, check, parse_condition
from medsight.data.schema import REGION_FEATURES
from medsight.data.sources import Source, load_source


def of(path: Path, layout: str = "biomedparse", **settings) -> Source:
    return Source(layout, str(path), **{"split": None, **settings})


def report_of(*sources: Source, **settings) -> Report:
    return check(sources, workers=1, progress=False, **settings)


def problems(*sources: Source, **settings) -> list[tuple[str, str]]:
    report = report_of(*sources, **settings)
    for finding in report.problems:
        assert finding.file in finding.message or finding.kind == "leaking patient"
    return sorted((finding.kind, Path(finding.file).name) for finding in report.problems)


def rewrite(manifest: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    rows = [change(json.loads(line)) for line in manifest.read_text("utf-8").splitlines()]
    manifest.write_text("\n".join(map(json.dumps, rows)), "utf-8")


def test_good_data_has_no_problem_and_is_counted(manifest_sets: Path) -> None:
    report = report_of(of(manifest_sets))
    assert report.ok and report.problems == []
    assert report.counts["rows"] == report.counts["images"] == {"train": 17, "test": 1}
    assert report.counts["masks"] == {"train": 4 + 24, "test": 1} and report.counts["absent"]["train"] == 1
    assert report.targets["liver"] == {"train": 12} and report.targets["breast tumor"] == {"train": 4, "test": 1}
    assert report.origins["CT / torso"] == {"train": 12}
    assert [(one.kind, one.message) for one in report.warnings] == [
        ("few images", "'breast tumor' is in 4 training image(s)")
    ]
    lines = [line.split() for line in report.to_text().splitlines()]
    assert ["rows", "17", "1"] in lines and ["breast", "tumor", "4", "1"] in lines


def test_every_broken_picture_is_named(named_sets: Path) -> None:
    masks = named_sets / "amos" / "train_mask"
    whole = (named_sets / "amos" / "train" / "case_0_CT_abdomen.png").read_bytes()
    (named_sets / "amos" / "train" / "case_0_CT_abdomen.png").write_bytes(whole[:50])
    (named_sets / "amos" / "train" / "case_1_CT_abdomen.png").write_bytes(b"")
    Image.fromarray(np.ones((3, 4), dtype=bool)).save(masks / "case_2_CT_abdomen_liver.png")
    Image.fromarray(np.zeros((12, 16), dtype=bool)).save(masks / "case_3_CT_abdomen_liver.png")
    (masks / "case_4_CT_abdomen_liver.png").write_bytes(b"no image")
    (masks / "case_0_CT_abdomen_liver.png").write_bytes(b"of a broken image too")
    assert problems(of(named_sets)) == [
        ("broken image", "case_0_CT_abdomen.png"),
        ("broken image", "case_1_CT_abdomen.png"),
        ("broken mask", "case_0_CT_abdomen_liver.png"),
        ("broken mask", "case_4_CT_abdomen_liver.png"),
        ("empty mask", "case_3_CT_abdomen_liver.png"),
        ("mask of another size", "case_2_CT_abdomen_liver.png"),
    ]


def test_missing_files_and_bad_rows_are_named(manifest_sets: Path) -> None:
    (manifest_sets / "torso" / "train" / "a0_CT_torso.png").unlink()
    (manifest_sets / "torso" / "train_mask" / "b1_CT_torso_liver.png").unlink()
    with (manifest_sets / "manifest.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"image": "x.png"}\nnot JSON\n')
    bad = [("bad item", "manifest.jsonl, line 31"), ("bad item", "manifest.jsonl, line 32")]
    missing = [("missing image", "a0_CT_torso.png"), ("missing mask", "b1_CT_torso_liver.png")]
    assert problems(of(manifest_sets)) == bad + missing


def test_several_threads_find_the_same(manifest_sets: Path) -> None:
    for name in ("a0", "b5"):
        (manifest_sets / "torso" / "train" / f"{name}_CT_torso.png").write_bytes(b"no image")
    reports = [check([of(manifest_sets)], workers=workers, progress=False) for workers in (1, 2)]
    assert len(reports[0].problems) == 2 and reports[0] == reports[1]


def test_unknown_targets(manifest_sets: Path) -> None:
    manifest = manifest_sets / "manifest.jsonl"
    assert problems(of(manifest_sets), targets=["liver", "breast tumor", "spleens"]) == sorted(
        ("unknown target", f"{volume}{number}_CT_torso_spleen.png") for volume in "ab" for number in range(6)
    )
    report = report_of(of(manifest_sets), targets=["liver", "breast tumor", "spleens"])
    assert "did you mean 'spleens'" in report.problems[0].message
    rewrite(manifest, lambda row: row | ({"target": "cyst"} if row["split"] == "test" else {}))
    assert problems(of(manifest_sets)) == [("unknown target", "5_ultrasound_breast_breast+tumor.png")]
    assert problems(of(manifest_sets, split="test")) == []


def test_targets_may_be_those_of_the_checkpoint_to_train_from(
    named_sets: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(named_sets), "--workers", "1", "--model", str(tiny_checkpoint)]) == 1
    assert "unknown target: " in capsys.readouterr().out


def test_codes_that_do_not_match_masks(grounded_file: Path) -> None:
    assert problems(of(grounded_file, "grounded")) == []
    items = json.loads(grounded_file.read_text("utf-8"))
    items[0]["mask_orders"] = [0, 1]
    grounded_file.write_text(json.dumps(items), "utf-8")
    report = report_of(of(grounded_file, "grounded"))
    assert [finding.kind for finding in report.problems] == ["codes and masks"]
    assert "answers.json, item 1 (id '11'): the answers cite 3 region code(s)" in report.problems[0].message


def test_a_mask_is_held_against_the_image_its_code_belongs_to(
    tmp_path: Path, draw_picture: Callable[..., Path], write_json: Callable[..., Path]
) -> None:
    draw_picture(tmp_path / "small.png", (16, 12))
    draw_picture(tmp_path / "large.png", (20, 14))
    draw_picture(tmp_path / "mask.png", (16, 12), inside=True)
    ask, show = ({"from": "human", "value": f"<image> {word}"} for word in ("What?", "And here?"))
    cite, plain = ({"from": "gpt", "value": value} for value in ("Liver [C0_1].", "A liver."))
    item = {"image": ["small.png", "large.png"], "mask_files": {"0": "mask.png"}, "mask_orders": [0]}
    path = write_json(tmp_path / "items.json", [{**item, "id": 1, "conversations": [ask, cite, show, plain]}])
    assert problems(of(path, "grounded")) == []
    write_json(path, [{**item, "id": 1, "conversations": [ask, plain, show, cite]}])
    assert problems(of(path, "grounded")) == [("mask of another size", "mask.png")]


def test_patients_in_several_splits(manifest_sets: Path) -> None:
    manifest = manifest_sets / "manifest.jsonl"
    rewrite(manifest, lambda row: row | ({"split": "test"} if "a5_CT" in row["image"] else {}))
    assert [kind for kind, _ in problems(of(manifest_sets))] == ["leaking patient"]
    report = report_of(of(manifest_sets))
    assert "torso:a is in 2 splits of torso" in report.problems[0].message
    assert "a5_CT_torso.png" in report.problems[0].message
    rewrite(manifest, lambda row: row | ({"same_volume_in_train": True} if row["group"] == "torso:a" else {}))
    report = report_of(of(manifest_sets))
    assert report.ok and [finding.kind for finding in report.warnings] == ["known leak", "few images"]


@pytest.mark.parametrize("format", ["PNG", "TIFF"], ids=["same bytes", "same pixels"])
def test_a_picture_in_several_splits_is_a_problem_whatever_it_is_called(named_sets: Path, format: str) -> None:
    train = named_sets / "amos" / "train" / "case_0_CT_abdomen.png"
    Image.open(train).save(named_sets / "amos" / "test" / "case_5_CT_abdomen.png", format)
    (found,) = report_of(of(named_sets)).problems
    assert found.kind == "picture in several splits" and f"train: {train}" in found.message
    assert "case_5_CT_abdomen.png" in found.message and report_of(of(named_sets, split="train")).ok


def test_blurred_and_inverted_masks_are_told_and_labels_and_volumes_are_problems(named_sets: Path) -> None:
    masks = named_sets / "amos" / "train_mask"
    labels = np.zeros((12, 16), dtype=np.uint8)
    labels[2:7, 3:9] = 255
    Image.fromarray(labels).save(masks / "case_0_CT_abdomen_liver.png", "JPEG")
    Image.fromarray(255 - labels).save(masks / "case_3_CT_abdomen_liver.png")
    labels[2:7, 6:9] = 100
    Image.fromarray(labels).save(masks / "case_1_CT_abdomen_liver.png")
    (masks / "case_2_CT_abdomen_liver.png").write_bytes((348).to_bytes(4, "little") + bytes(400))
    report = report_of(of(named_sets))
    told = {one.kind: Path(one.file).name for one in report.warnings if "masks" in one.kind}
    assert told == {"blurred masks": "case_0_CT_abdomen_liver.png", "inverted masks?": "case_3_CT_abdomen_liver.png"}
    assert [(one.kind, Path(one.file).name) for one in report.problems] == [
        ("mask of several structures", "case_1_CT_abdomen_liver.png"),
        ("mask that is no picture", "case_2_CT_abdomen_liver.png"),
    ]
    assert re.search(r"0, 100, 255.*`target`", report.problems[0].message)
    assert re.search(r"is a NIfTI volume.*slices as PNG files.*open_scan", report.problems[1].message)


def test_an_image_asked_about_in_two_splits_leaks(
    tmp_path: Path, draw_picture: Callable[..., Path], write_json: Callable[..., Path]
) -> None:
    draw_picture(tmp_path / "a.png")
    turns = [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes."}]
    for split in ("train", "test"):
        write_json(tmp_path / f"{split}.json", [{"id": 1, "image": "a.png", "conversations": turns, "dataset": "d"}])
    assert problems(of(tmp_path, "llava")) == [("leaking patient", "a.png")]
    two = [of(tmp_path / f"{split}.json", "llava", split=split) for split in ("train", "test")]
    assert problems(*two) == [("leaking patient", "a.png")]
    assert problems(two[0]) == []


def test_embedded_pictures_are_read_too(manifest_sets: Path, tmp_path: Path) -> None:
    row = load_source(of(manifest_sets, where={"target": "liver"}))[0]
    good = {"path": None, "bytes": Path(row["image"]["path"]).read_bytes()}
    rows = [{**row, "image": good, "masks": [{"path": None, "bytes": b"broken"}]}, {**row, "image": {"bytes": b""}}]
    datasets.Dataset.from_list(rows, features=REGION_FEATURES).to_parquet(tmp_path / "rows.parquet")
    assert problems(of(tmp_path / "rows.parquet", "parquet")) == [
        ("broken image", "rows.parquet, row 2, image"),
        ("broken mask", "rows.parquet, row 1, masks 0"),
    ]


def test_the_command_prints_the_report_and_says_whether_training_may_start(
    named_sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(named_sets), "--workers", "1"]) == 0
    printed = capsys.readouterr()
    assert f"{named_sets} (biomedparse)" in printed.out and "left kidney" in printed.out
    assert "checking" in printed.err and "7row" in printed.err
    (named_sets / "hc" / "train" / "7_ultrasound_fetal+head.png").write_bytes(b"")
    assert main(["data", "check", str(named_sets), "--workers", "1"]) == 1
    printed = capsys.readouterr()
    assert "problems: 1\n  broken image: " in printed.out
    assert printed.err.splitlines()[-1].endswith("training cannot start on it: 1 broken image")
    assert main(["data", "check", str(named_sets), "--split", "test", "--workers", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True and report["rows"] == {"test": 1}


def test_wrong_usage_is_refused(named_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "nowhere: no such file or folder"),
        ([str(named_sets), "--layout", "biomedparce"], "did you mean 'biomedparse'"),
        ([str(named_sets), "--workers", "0"], "workers must be greater than 0"),
        ([str(named_sets), "--split", "val"], "validation"),
        ([str(named_sets), "--where", "split"], "FIELD=VALUE"),
        ([str(named_sets), "--targets", str(tmp_path / "targets.txt")], "targets.txt: No such file"),
    ):
        assert main(["data", "check", *arguments]) == 1, arguments
        assert message in "".join(capsys.readouterr())
    assert main(["data"]) == 2


def test_conditions_are_read() -> None:
    assert parse_condition("image_in_test=false") == ("image_in_test", False)
    assert parse_condition("tier=A=B") == ("tier", "A=B")


def test_real_questions_pass_and_are_clean_without_the_shared_images(shared_data: Path, verb: Callable) -> None:
    (report,) = verb("data", "check", shared_data / "vqa_rad", "--workers", 1)
    assert report["conversations"] == {"train": 1797, "test": 451} and sum(report["images"].values()) == 314
    assert [finding["kind"] for finding in report["warnings"]] == ["known leak"]
    (report,) = verb("data", "check", shared_data / "vqa_rad", "--workers", 1, "--where", "image_in_test=false")
    assert report["conversations"] == {"train": 734} and report["warnings"] == []
