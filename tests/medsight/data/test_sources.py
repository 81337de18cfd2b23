"""A recipe's sources: their keys, and every layout as map-style and as streamed rows of one of two schemas."""

import dataclasses
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest

from medsight.data.pictures import read_mask, read_picture
from medsight.data.schema import CONVERSATION_FEATURES, REGION_FEATURES
from medsight.data.sources import Source, detect_layout, kind_of, load_source, warn_of_shared_pictures
from tests.medsight.data.conftest import ANSWERED, ASKED


def names(row: dict) -> list[str]:
    return [Path(entry["path"]).name for entry in ([row["image"]] if "image" in row else row["images"])]


@pytest.fixture
def region_parquet(manifest_sets: Path, tmp_path: Path) -> Path:
    """Rows of the regions' schema in files named after splits, with the pictures' bytes in them."""
    folder = tmp_path / "packed"
    for split in ("train", "test"):
        rows = list(load_source(Source("biomedparse", str(manifest_sets), split=split)))
        for row in rows:
            for entry in (row["image"], *row["masks"]):
                entry["bytes"] = Path(entry["path"]).read_bytes()
                entry["path"] = Path(entry["path"]).name
        (folder / "data").mkdir(parents=True, exist_ok=True)
        packed = datasets.Dataset.from_list(rows, features=REGION_FEATURES)
        for number in range(min(2, len(rows))):
            shard = packed.shard(2, number, contiguous=True)
            shard.to_parquet(folder / "data" / f"{split}-{number:05}-of-00002.parquet")
    return folder


@pytest.fixture
def conversation_parquet(grounded_file: Path) -> Path:
    """Rows of the conversations' schema whose pictures lie in files beside it."""
    rows = list(load_source(Source("grounded", str(grounded_file))))
    for row in rows:
        for entry in (*row["images"], *row["masks"]):
            entry["path"] = os.path.relpath(entry["path"], grounded_file.parent)
    path = grounded_file.parent / "answers.parquet"
    datasets.Dataset.from_list(rows, features=CONVERSATION_FEATURES).to_parquet(path)
    return path


@pytest.fixture
def write_shard(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tar file of members: bytes, or anything else as JSON."""

    def write(members: dict[str, Any], name: str = "shard-000.tar") -> Path:
        path = tmp_path / "shards" / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as archive:
            for member, value in members.items():
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, BytesIO(content))
        return path

    return write


@pytest.fixture
def region_members(draw_picture: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    image, mask = (draw_picture(tmp_path / f"{inside}.png", inside=inside).read_bytes() for inside in (False, True))
    meta = {"modality": "CT", "site": "torso", "patient": "p1", "dataset": "demo"}
    members: dict[str, Any] = {"a/1.png": image, "a/1.json": {**meta, "targets": ["liver"] * 12}}
    members |= {f"a/1.mask.{number}.png": mask for number in range(12)}
    return members | {"a/2.png": image, "a/2.json": {**meta, "absent": ["liver"]}}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"layout": "llava", "path": "a.json", "splitt": "train"}, "'splitt'.*did you mean 'split'"),
        ({"layout": "biomedparce", "path": "a"}, "'biomedparce'.*did you mean 'biomedparse'"),
        ({"layout": "llava"}, "'path'"),
        ({"path": "a"}, "'layout'"),
        ({"layout": "llava", "path": 3}, "path.*3"),
        ({"layout": "llava", "path": "a", "limit": 0}, "limit.*0"),
        ({"layout": "llava", "path": "a", "where": ["x"]}, "where"),
        ("a.json", "mapping"),
    ],
)
def test_a_bad_entry_is_refused(entry: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source.from_mapping(entry)


def test_an_entry_becomes_a_source() -> None:
    entry = {"layout": "vqa_rad", "path": "a", "split": "val", "where": {"image_in_test": False}, "limit": 3}
    assert Source.from_mapping(entry) == Source("vqa_rad", "a", "validation", None, 3, {"image_in_test": False})


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streamed"])
def test_every_layout_gives_rows_of_its_schema(
    streaming: bool, manifest_sets: Path, grounded_file: Path, region_parquet: Path, conversation_parquet: Path
) -> None:
    for path, layout, kind, rows in (
        (manifest_sets, "biomedparse", "regions", 17),
        (grounded_file, "grounded", "conversations", 2),
        (region_parquet, "parquet", "regions", 17),
        (conversation_parquet, "parquet", "conversations", 2),
    ):
        source = Source(detect_layout(path), str(path))
        assert (source.layout, kind_of(source)) == (layout, kind)
        loaded = load_source(source, streaming=streaming)
        assert isinstance(loaded, datasets.IterableDataset if streaming else datasets.Dataset)
        assert loaded.features == (REGION_FEATURES if kind == "regions" else CONVERSATION_FEATURES)
        read = list(loaded)
        assert len(read) == rows
        for row in read:
            images = [row["image"]] if kind == "regions" else row["images"]
            for entry in row["masks"]:
                assert read_mask(entry, read_picture(images[0]).size).any()


def test_parquet_gives_what_was_written(region_parquet: Path, manifest_sets: Path, conversation_parquet: Path) -> None:
    written = load_source(Source("biomedparse", str(manifest_sets), split=None))
    read = load_source(Source("parquet", str(region_parquet), split=None))
    assert sorted(map(names, written)) == sorted(map(names, read))
    for column in ("targets", "absent", "patient", "finding", "split"):
        assert sorted(map(str, written[column])) == sorted(map(str, read[column]))
    assert set(load_source(Source("parquet", str(region_parquet), split="test"))["split"]) == {"test"}
    one_file = Source("parquet", str(region_parquet / "data" / "t*-00001-of-00002.parquet"))
    assert 0 < len(load_source(one_file)) < 17
    assert load_source(Source("parquet", str(region_parquet)), streaming=True).num_shards == 2
    messages = load_source(Source("parquet", str(conversation_parquet)))["messages"]
    assert "[C0_7]" in messages[0][1]["content"]


@pytest.mark.parametrize("name", ["shard-000.tar", "shard-000.tar.gz"])
def test_samples_of_a_tar_shard(write_shard: Callable[..., Path], region_members: dict[str, Any], name: str) -> None:
    path = write_shard(region_members, name)
    source = Source(detect_layout(path.parent), str(path.parent))
    assert kind_of(source) == "regions" and source.layout == "webdataset"
    first, second = load_source(source, streaming=True)
    assert [Path(mask["path"]).name for mask in first["masks"]] == [f"1.mask.{number}.png" for number in range(12)]
    assert (first["dataset"], first["patient"], second["absent"], second["masks"]) == ("demo", "p1", ["liver"], [])
    assert read_mask(first["masks"][11], read_picture(first["image"]).size).sum() == 30
    assert list(load_source(source)) == [first, second]


def test_conversations_in_a_tar_shard(write_shard: Callable[..., Path], region_members: dict[str, Any]) -> None:
    image, mask = region_members["a/1.png"], region_members["a/1.mask.0.png"]
    turns = [{"from": "human", "value": "Compare."}, {"from": "gpt", "value": "Here: liver [C0_1]."}]
    item = {"id": "x", "conversations": turns}
    path = write_shard({"1.json": item, "1.0.png": image, "1.1.png": image, "1.mask.0.png": mask})
    (row,) = load_source(Source("webdataset", str(path)))
    assert row["messages"][0]["content"] == "<image>\n<image>\nCompare."
    assert names(row) == ["shard-000.tar, 1.0.png", "shard-000.tar, 1.1.png"]
    assert read_mask(row["masks"][0], read_picture(row["images"][1]).size).any()
    write_shard({"1.json": item, "1.png": image})
    with pytest.raises(ValueError, match=r"shard-000\.tar, sample 1: .*1 region code.*0 mask"):
        load_source(Source("webdataset", str(path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a/2.cls": b"3"}, r"sample a/2: no use is known for the member \.cls"),
        ({"a/2.mask.1.png": b""}, "numbered from 0"),
        ({"a/2.mask.0.png": b""}, r"1 mask\(s\) for 0 target"),
        ({"a/3.png": b""}, r"sample a/3: expected a member \.json"),
        ({"a/3.json": {"modality": "CT", "site": "torso"}}, "expected one image, got 0"),
        ({"a/3.json": b"{", "a/3.png": b""}, "3.json: not a JSON object"),
        ({"a/3.json": {"site": "torso"}, "a/3.png": b""}, "'modality'"),
        ({"a/3.json": {"patien": "7"}, "a/3.png": b""}, "the field 'patien' is unknown, .* did you mean 'patient'"),
    ],
)
def test_a_bad_sample_is_named(
    write_shard: Callable[..., Path], region_members: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    path = write_shard(region_members | change)
    with pytest.raises(ValueError, match=message):
        load_source(Source("webdataset", str(path)))


@pytest.mark.parametrize(("layout", "name"), [("parquet", "rows.parquet"), ("webdataset", "rows.tar")])
def test_a_damaged_file_is_named(tmp_path: Path, layout: str, name: str) -> None:
    (tmp_path / name).write_bytes(b"neither of both" * 100)
    with pytest.raises(ValueError, match=name):
        load_source(Source(layout, str(tmp_path / name)))


def test_parquet_of_other_columns_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet, row 1: expected columns.*\['a'\]"):
        load_source(Source("parquet", str(tmp_path / "other.parquet")))
    columns = {"image": ["a.png"], "masks": [["b.png"]], "targets": [["liver"]], "modalty": ["CT"]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"row 1: the field 'modalty' is unknown.*did you mean 'modality'"):
        load_source(Source("parquet", str(tmp_path / "other.parquet")))


def test_limit_takes_the_first_rows(region_parquet: Path, manifest_sets: Path) -> None:
    for layout, path in (("parquet", region_parquet), ("biomedparse", manifest_sets)):
        whole = list(load_source(Source(layout, str(path))))
        for limit, streaming in ((11, False), (11, True), (99, False)):
            limited = load_source(Source(layout, str(path), limit=limit), streaming=streaming)
            assert list(limited) == whole[:limit]


def test_no_row_is_an_error_that_says_what_there_is(manifest_sets: Path, tmp_path: Path) -> None:
    for streaming in (False, True):
        with pytest.raises(ValueError, match="no row of the split 'validation'; its splits: test, train"):
            load_source(Source("biomedparse", str(manifest_sets), split="val"), streaming=streaming)
        with pytest.raises(ValueError, match="no row of the split 'train' with tier = 'A'"):
            load_source(Source("biomedparse", str(manifest_sets), where={"tier": "A"}), streaming=streaming)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_source(Source("llava", str(tmp_path / "nowhere.json")))
    with pytest.raises(FileNotFoundError, match="no .json or .jsonl file"):
        load_source(Source("llava", str(tmp_path / "*.json")))


def test_files_of_a_folder_are_told_apart_by_the_split_in_their_names(
    tmp_path: Path, write_json: Callable[..., Path]
) -> None:
    turns = [ASKED, ANSWERED]
    for name in ("train_a.json", "train-b.jsonl", "val.json"):
        write_json(tmp_path / name, [{"id": name, "conversations": turns}])
    rows = load_source(Source("llava", str(tmp_path)))
    assert rows["id"] == ["train-b.jsonl", "train_a.json"]
    assert load_source(Source("llava", str(tmp_path), split=None))["split"] == ["train", "train", "validation"]
    with pytest.raises(ValueError, match="no file of the split 'test'"):
        load_source(Source("llava", str(tmp_path), split="test"))
    for pattern in ("*.json*", "[tv]*"):
        assert load_source(Source("llava", str(tmp_path / pattern)))["id"] == ["train-b.jsonl", "train_a.json"]
    assert load_source(Source("llava", str(tmp_path / "*.json"), split="dev"))["id"] == ["val.json"]
    with pytest.raises(ValueError, match="no file of the split 'train', only of \\['validation'\\]"):
        load_source(Source("llava", str(tmp_path / "v*.json")))
    assert load_source(Source("llava", str(tmp_path / "val.json")))["split"] == ["train"]  # named itself
    write_json(tmp_path / "of a lab" / "train" / "a.json", [{"id": "a", "conversations": turns}])
    write_json(tmp_path / "of a lab" / "test" / "a.json", [{"id": "b", "conversations": turns}])
    assert load_source(Source("llava", str(tmp_path / "of*" / "**" / "*.json"), split="test"))["id"] == ["b"]
    for name in ("captions_train2017.json", "captions_val2017.json", "a-test.json"):
        write_json(tmp_path / "later" / name, [{"id": name, "conversations": turns}])
    assert load_source(Source("llava", str(tmp_path / "later")))["id"] == ["captions_train2017.json"]
    everything = load_source(Source("llava", str(tmp_path / "later"), split=None))
    assert everything["split"] == ["test", "train", "validation"]
    write_json(tmp_path / "trainer.json", [])
    with pytest.raises(ValueError, match=r"trainer\.json: its name tells no split"):
        load_source(Source("llava", str(tmp_path)))


def test_bad_rows_are_left_out_on_request(
    manifest_sets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = next(manifest_sets.rglob("manifest.jsonl"))
    whole = load_source(Source("biomedparse", str(manifest_sets)))
    with manifest.open("a", encoding="utf-8") as file:
        file.write('{"image": "no target.png"}\n')
    source = Source("biomedparse", str(manifest_sets))
    with pytest.raises(ValueError, match=r"manifest.jsonl, line \d+"):
        load_source(source)
    assert len(load_source(source, skip_errors=True)) == len(whole)
    assert "manifest.jsonl, line" in caplog.text and "left out" in caplog.text


def test_new_and_changed_files_are_read_again_and_nothing_is_left_beside_them(
    manifest_sets: Path, named_sets: Path, draw_picture: Callable[..., Path], own_datasets_cache: Path
) -> None:
    before = sorted(manifest_sets.rglob("*"))
    source = Source("biomedparse", str(manifest_sets))
    assert len(load_source(source)) == len(load_source(source)) == 17
    caches = len(list(own_datasets_cache.rglob("*.arrow")))
    assert caches == 1 and sorted(manifest_sets.rglob("*")) == before
    manifest = manifest_sets / "manifest.jsonl"
    kept = [line for line in manifest.read_text("utf-8").splitlines() if "torso:b" not in line]
    manifest.write_text("\n".join(kept), "utf-8")
    assert len(load_source(source)) == 11
    source = Source("biomedparse", str(named_sets))
    assert len(load_source(source)) == 6
    draw_picture(named_sets / "amos" / "train" / "case_8_CT_abdomen.png")
    assert len(load_source(source)) == 7


def test_a_relative_path_means_the_same_from_anywhere(
    grounded_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(grounded_file.parent)
    rows = load_source(Source("grounded", "answers.json"))
    monkeypatch.chdir(tmp_path.parent)
    assert read_picture(rows[0]["images"][0]).size == (16, 12)


def test_what_a_folder_holds_decides_on_its_layout(tmp_path: Path, named_sets: Path) -> None:
    assert detect_layout(named_sets) == detect_layout(named_sets / "amos") == "biomedparse"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="none of the layouts"):
        detect_layout(tmp_path / "empty")
    (tmp_path / "odd.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"odd\.jsonl, line 1.*\['a'\]"):
        detect_layout(tmp_path / "odd.jsonl")
    with pytest.raises(FileNotFoundError):
        detect_layout(tmp_path / "nowhere")


def test_a_picture_of_two_splits_is_warned_of_by_whoever_reads_one(
    named_sets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source("biomedparse", str(named_sets / "amos"))
    warn_of_shared_pictures(source)
    assert not caplog.records
    folder = named_sets / "amos"
    shutil.copy(folder / "train" / "case_0_CT_abdomen.png", folder / "test" / "case_5_CT_abdomen.png")
    for split in ("train", "test"):
        warn_of_shared_pictures(dataclasses.replace(source, split=split))
        assert f"1 picture(s) of the split {split} are in another split too" in caplog.messages[-1]
