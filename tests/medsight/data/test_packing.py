"""Data of any layout as parquet shards: read back equal, whole or not at all."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from medsight.data import shards
from medsight.data.check import check
from medsight.data.packing import pack
from medsight.data.registry import Source
from medsight.data.sources import detect_layout, find_source, iterate
from tests.medsight.data.layouts import test_coco
from tests.medsight.data.layouts.picture_sets import contents, write_biomedparse


def without_pictures(source: Source) -> list[dict[str, Any]]:
    """The rows, but for what their pictures are called and hold, by the names of their images."""
    rows = []
    for entry in iterate(source):
        row = dict(entry.checked())
        row["spacing_mm"] = [list(size) if size else None for size in row["spacing_mm"]]
        rows.append((Path(row.pop("image")["path"]).name, len(row.pop("masks")), row))
    return sorted(rows, key=lambda row: row[0])


@pytest.mark.parametrize("layout", ["biomedparse", "coco"])
def test_rows_are_read_back_equal(tmp_path: Path, layout: str) -> None:
    source = write_biomedparse(tmp_path / "set")
    if layout == "coco":
        source = test_coco.source_of(test_coco.write(tmp_path / "coco"))
    source = dataclasses.replace(source, rename={"liver": "hepar"}, complete=True)
    report = pack(source, tmp_path / "packed")
    assert detect_layout(tmp_path / "packed") == "parquet"
    back = find_source(tmp_path / "packed", split=None)
    back = dataclasses.replace(back, split=None)
    assert contents(back) == contents(source)
    assert without_pictures(back) == without_pictures(source)
    assert any(row["absent"] for _, _, row in without_pictures(back))
    assert report.counts == check([back], progress=False).counts
    names = [entry.checked()["image"]["path"] for entry in iterate(back)]
    assert len({*names}) == 7 and not any(str(tmp_path) in name for name in names)


def test_the_card_counts_and_the_library_finds_the_splits(tmp_path: Path) -> None:
    pack(write_biomedparse(tmp_path / "set"), tmp_path / "packed")
    card = (tmp_path / "packed/README.md").read_text("utf-8")
    assert "| train | 6 | 6 | 3 | 7 | 2 |" in card and "| liver | 4 | 1 |" in card
    loaded = load_dataset(str(tmp_path / "packed"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 6, "test": 1}


def test_conversations_and_known_leaks_are_kept(grounded_file: Path, manifest_sets: Path, tmp_path: Path) -> None:
    source = find_source(grounded_file)
    pack(source, tmp_path / "packed")
    back = find_source(tmp_path / "packed")
    for before, after in zip(iterate(source), iterate(back), strict=True):
        assert after.checked()["messages"] == before.checked()["messages"]
        assert [mask["bytes"] for mask in after.checked()["masks"]] == [
            Path(mask["path"]).read_bytes() for mask in before.checked()["masks"]
        ]
    manifest = manifest_sets / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("{", '{"same_volume_in_train": true, '))
    pack(find_source(manifest_sets), tmp_path / "leaking")
    assert all(entry.known_leak for entry in iterate(find_source(tmp_path / "leaking")))


def test_a_row_group_is_all_that_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_ROWS", 2)
    monkeypatch.setattr(shards, "SHARD_BYTES", 0)
    pack(write_biomedparse(tmp_path / "set"), tmp_path / "packed")
    names = sorted(file.name for file in (tmp_path / "packed").glob("*.parquet"))
    assert names == ["test-00000.parquet", *(f"train-0000{number}.parquet" for number in range(3))]
    assert len(list(iterate(find_source(tmp_path / "packed")))) == 6


@pytest.mark.parametrize("what", ["a bad row", "a missing picture", "a full folder", "another split"])
def test_it_is_written_whole_or_not_at_all(tmp_path: Path, what: str) -> None:
    source = write_biomedparse(tmp_path / "set")
    message = {"a bad row": "line 12", "a missing picture": "p0_00.png", "a full folder": "packed is not empty"}
    if what == "a bad row":
        with (tmp_path / "set/manifest.jsonl").open("a") as file:
            file.write("\n{}")
    elif what == "a missing picture":
        (tmp_path / "set/train/p0_00.png").unlink()
    elif what == "a full folder":
        (tmp_path / "packed").mkdir()
        (tmp_path / "packed/mine").touch()
    else:
        source = dataclasses.replace(source, split="validation")
    with pytest.raises((ValueError, OSError), match=message.get(what, "no row of the split 'validation'")):
        pack(source, tmp_path / "packed")
    left = {path.name for path in tmp_path.iterdir()} - {"set"}
    assert left == ({"packed"} if what == "a full folder" else set())
