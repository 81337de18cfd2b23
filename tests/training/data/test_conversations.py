"""Conversations of the LLaVA type, plain and grounded: turns, markers, codes and masks must belong together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from medsight.training.data.conversation_splits import hold_out_conversations
from medsight.training.data.conversations import (
    CodeMaskError,
    check_conversation,
    cited_codes,
    code_images,
    count_codes,
)
from medsight.training.data.schema import CONVERSATION_FEATURES
from medsight.training.data.sources import Source, iterate, load_source
from medsight.training.data.splits import divide


ASKED = {"from": "human", "value": "What is shown?"}
ANSWERED = {"from": "gpt", "value": "A scan."}


def split(rows: Dataset, fraction: float, seed: int, *beside: tuple[Dataset, Dataset]) -> tuple[Dataset, Dataset]:
    return divide(rows, hold_out_conversations(rows, fraction, seed, beside))


@pytest.fixture
def read_items(tmp_path: Path, write_json: Callable[..., Path]) -> Callable[..., list[dict]]:
    """Writes items to a file and reads them back as rows."""

    def read(items: list[dict], name: str = "items.json", **settings) -> list[dict]:
        path = write_json(tmp_path / name, items)
        return list(load_source(Source("llava", str(path), **settings)))

    return read


def test_an_array_and_lines_give_the_same_rows(read_items: Callable[..., list[dict]], tmp_path: Path) -> None:
    items = [
        {"id": f"p{number}", "image": [f"a{number}.jpg", f"b{number}.jpg"], "conversations": [ASKED, ANSWERED]}
        for number in range(5)
    ]
    rows = read_items(items)
    assert rows == [{**row, "dataset": "items"} for row in read_items(items, "items.jsonl")]
    assert [image["path"] for image in rows[3]["images"]] == [str(tmp_path / "a3.jpg"), str(tmp_path / "b3.jpg")]
    assert rows[3]["id"] == "p3" and rows[3]["masks"] == [] and rows[3]["split"] == "train"
    elsewhere = read_items(items, images=str(tmp_path / "pictures"))
    assert elsewhere[0]["images"][0]["path"] == str(tmp_path / "pictures" / "a0.jpg")


def test_an_item_longer_than_what_is_read_at_once_is_whole(
    read_items: Callable[..., list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medsight.training.data.records._CHUNK", 7)
    items = [{"id": n, "conversations": [ASKED, {**ANSWERED, "value": "so, [it] is " * 40}]} for n in range(3)]
    rows = read_items(items)
    assert [row["id"] for row in rows] == ["0", "1", "2"]
    assert rows[2]["messages"][1]["content"] == "so, [it] is " * 40


def test_missing_markers_go_before_the_first_question(read_items: Callable[..., list[dict]]) -> None:
    system = {"from": "system", "value": "Be brief."}
    kept = {"from": "human", "value": "What is this?\n<image>"}
    rows = read_items(
        [
            {"id": 1, "images": ["a.png", "b.png"], "conversations": [system, ASKED, ANSWERED, ASKED, ANSWERED]},
            {"id": 2, "image": "a.png", "conversations": [kept, ANSWERED]},
            {"id": 3, "conversations": [ASKED, ANSWERED]},
        ]
    )
    contents = [[message["content"] for message in row["messages"]] for row in rows]
    assert contents[0] == ["Be brief.", "<image>\n<image>\nWhat is shown?", "A scan.", "What is shown?", "A scan."]
    assert contents[1] == ["What is this?\n<image>", "A scan."]
    assert contents[2] == ["What is shown?", "A scan."]
    assert [message["role"] for message in rows[0]["messages"]][:3] == ["system", "user", "assistant"]


def test_origins_are_taken_from_the_published_fields(read_items: Callable[..., list[dict]], tmp_path: Path) -> None:
    turns = [ASKED, ANSWERED]
    rows = read_items(
        [
            {"id": 1, "image": "a.png", "conversations": turns, "modality": "CT", "body_part": "Chest"},
            {"id": 2, "image": "a.png", "conversatons": turns, "domain": {"mri": True, "gross": False}},
            {"id": 3, "image": "a.png", "conversations": turns, "patient": "p", "dataset": "d", "split": "val"},
        ],
        split=None,
    )
    assert (rows[0]["modality"], rows[0]["site"], rows[1]["modality"]) == ("CT", "Chest", "mri")
    assert rows[0]["patient"] == rows[1]["patient"] == str(tmp_path / "a.png")
    assert (rows[2]["patient"], rows[2]["dataset"], rows[2]["split"]) == ("p", "d", "validation")


def test_masks_follow_the_codes_through_mask_orders(grounded_file: Path) -> None:
    grounded, plain = load_source(Source("grounded", str(grounded_file)))
    assert cited_codes(grounded["messages"]) == ["[C0_7]", "[C0_16]", "[C0_16]"]
    assert [Path(mask["path"]).name for mask in grounded["masks"]] == ["spleen.png", "liver.png", "liver.png"]
    assert grounded["targets"] == ["", "", ""] and plain["masks"] == []


BAD_ITEMS = {
    "more markers than images": ({"image": "a.png", "conversations": [{**ASKED, "value": "<image><image>"}]}, "2 <im"),
    "marker without image": ({"conversations": [{**ASKED, "value": "<image> Hm?"}]}, "1 <image>.*0 image"),
    "marker in an answer": (
        {"image": "a.png", "conversations": [{**ASKED, "value": "<image>"}, "<image>"]},
        "outside",
    ),
    "no answer": ({"conversations": [ASKED, ANSWERED, ASKED]}, "turns of user and assistant"),
    "answer first": ({"conversations": [ANSWERED, ASKED]}, "turns of user and assistant"),
    "unknown role": ({"conversations": [{"from": "bot", "value": "Hm?"}]}, "'bot'"),
    "empty answer": ({"conversations": [ASKED, ""]}, "expected text in 'value'"),
    "no turns": ({"image": "a.png", "text": "x"}, "'conversations'.*'image', 'text'"),
    "image of another type": ({"image": {"a": 1}, "conversations": [ASKED]}, "path of an image"),
    "code without mask": ({"image": "a.png", "conversations": [ASKED, "liver [C0_1]"]}, r"1 region code.*0 mask"),
    "code without image": (
        {"conversations": [ASKED, "liver [C0_1]"], "mask_files": {"0": "m.png"}, "mask_orders": [0]},
        r"\[C0_1\] stands before any image",
    ),
    "mask that is not there": (
        {"image": "a.png", "conversations": [ASKED, "[C0_1]"], "mask_files": {"0": "m"}, "mask_orders": [3]},
        "mask_orders names 3",
    ),
    "mask without a place": (
        {"image": "a.png", "conversations": [ASKED, "[C0_1]"], "mask_files": {"0": "m", "5": "n"}, "mask_orders": [0]},
        "mask '5'",
    ),
    "order unknown": (
        {"image": "a.png", "conversations": [ASKED, "[C0_1] [C0_2]"], "mask_files": {"0": "m", "1": "n"}},
        "without mask_orders",
    ),
}


@pytest.mark.parametrize(("item", "message"), BAD_ITEMS.values(), ids=BAD_ITEMS.keys())
def test_a_bad_item_is_named_by_file_and_id(
    read_items: Callable[..., list[dict]], tmp_path: Path, item: dict, message: str
) -> None:
    good = {"id": "first", "conversations": [ASKED, ANSWERED]}
    if "conversations" in item:
        turns = [turn if isinstance(turn, dict) else {"from": "gpt", "value": turn} for turn in item["conversations"]]
        item = {**item, "conversations": turns if len(turns) > 1 else [*turns, ANSWERED]}
    with pytest.raises(ValueError, match=rf"items\.json, item 2 \(id 'case-7'\).*{message}"):
        read_items([good, {"id": "case-7", **item}])
    found = list(iterate(Source("llava", str(tmp_path / "items.json"))))
    assert found[0].row is not None and found[1].error is not None
    of_codes = "region code" in message or "before any image" in message
    assert isinstance(found[1].error, CodeMaskError) == of_codes


@pytest.mark.parametrize(
    ("name", "content", "message", "rows"),
    [
        ("cut.json", '[{"id": 1, "conversations": []}, {"id": 2, "conv', "cut.json, item 2.*cut short", 2),
        ("cut.jsonl", '{"id": \n', "cut.jsonl, line 1", 1),
        ("list.jsonl", "[1, 2]\n", "list.jsonl, item 1.*got int", 2),
        ("latin.json", b'[{"id": "\xe9"}]', "latin.json: expected UTF-8", 1),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str | bytes, message: str, rows: int) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = list(iterate(Source("llava", str(tmp_path / name))))
    assert len(found) == rows
    with pytest.raises(ValueError, match=message):
        raise found[-1 if "item 1" not in message else 0].error


def test_a_code_belongs_to_the_last_image_before_it() -> None:
    messages = [
        {"role": "user", "content": "<image>\n<image>\nCompare. Not [C9_9]."},
        {"role": "assistant", "content": "Here [C0_1] and [SEG], not [C00_1] or [C1]."},
        {"role": "user", "content": "<image>\nAnd now?"},
        {"role": "assistant", "content": "[C1_12]"},
    ]
    assert code_images(messages) == [1, 1, 2]
    assert count_codes(messages[1]["content"]) == 2 and cited_codes(messages) == ["[C0_1]", "[SEG]", "[C1_12]"]
    row = {"messages": messages, "images": [{}] * 3, "masks": [{}] * 3, "targets": ["a"]}
    with pytest.raises(ValueError, match="here: 1 target.*3 mask"):
        check_conversation(row, "here")


def test_all_conversations_of_an_image_come_on_one_side(read_items: Callable[..., list[dict]], tmp_path: Path) -> None:
    turns = [ASKED, ANSWERED]
    # Five patients of two images and two conversations each; p4's second shares an image with p3.
    items = [
        {"id": f"{p}.{n}", "image": [f"{p}-{n}.png", "3-0.png"][: 1 + (p == 4)], "conversations": turns}
        for p in range(6)
        for n in (0, 1, 0)
    ]
    for item in items:
        item["patient"] = f"p{item['id'][0]}"
    read_items(items)
    rows = load_source(Source("llava", str(tmp_path / "items.json")))
    for seed in range(12):
        training, held = split(rows, 0.2, seed)
        assert len(training) + len(held) == len(rows) and len(held) in (3, 6)
        sides = [{path["path"] for row in side for path in row["images"]} for side in (training, held)]
        assert not sides[0] & sides[1]
        assert len(held) == (6 if {"p3", "p4"} & set(held["patient"]) else 3)
    assert len(split(rows, 0, 0)[1]) == 0


def test_an_image_of_two_sets_is_on_one_side(read_items: Callable[..., list[dict]], tmp_path: Path) -> None:
    turns = [ASKED, ANSWERED]
    items = [
        {"id": f"{name} {p}", "image": f"{p}.png", "conversations": turns, "dataset": name, "patient": f"{name} {p}"}
        for name in ("one", "two")
        for p in range(10)
    ]
    read_items(items)
    rows = load_source(Source("llava", str(tmp_path / "items.json")))
    for seed in range(4):
        training, held = split(rows, 0.2, seed)
        sides = [{row["images"][0]["path"] for row in side} for side in (training, held)]
        assert not sides[0] & sides[1]
        assert len(training) + len(held) == len(rows)


def test_images_and_patients_are_on_the_side_of_their_masks(
    manifest_sets: Path, read_items: Callable[..., list[dict]], tmp_path: Path
) -> None:
    """Conversations about images that have masks, others of the same patients, and about ones of neither."""
    from medsight.training.data import biomedparse

    regions = load_source(Source("biomedparse", str(manifest_sets)))
    told = [
        {"image": row["image"]["path"], "dataset": "questions", "patient": f"q{number}"}
        for number, row in enumerate(regions)
    ]
    told += [
        {"image": f"{number}.png", "dataset": "busi", "patient": row["patient"]}
        for number, row in enumerate(regions)
        if row["dataset"] == "busi"
    ]
    free = [{"image": f"free {number}.png", "dataset": "questions", "patient": f"f{number}"} for number in range(40)]
    for some in (told + free, told):
        read_items([{"id": str(n), "conversations": [ASKED, ANSWERED], **one} for n, one in enumerate(some)])
        rows = load_source(Source("llava", str(tmp_path / "items.json")))
        for seed in range(4):
            both = biomedparse.split_validation(regions, 0.3, seed + 10)
            training, held = split(rows, 0.2, seed, both)
            assert len(training) + len(held) == len(rows) and len(held)
            for side, other in ((training, both[1]), (held, both[0])):
                paths, patients = {row["image"]["path"] for row in other}, set(other["patient"])
                assert not {row["images"][0]["path"] for row in side} & paths
                assert not {row["patient"] for row in side if row["dataset"] == "busi"} & patients
            assert len(some) == len(told) or any("free" in row["images"][0]["path"] for row in held)


def sides_of(tmp_path: Path, read_items: Callable[..., list[dict]], items: list[dict], seed: int, *beside: Any) -> Any:
    """The items that are trained on and those that are held out."""
    read_items([{"id": str(n), "conversations": [ASKED, ANSWERED], **item} for n, item in enumerate(items)])
    both = split(load_source(Source("llava", str(tmp_path / "items.json"))), 0.3, seed, *beside)
    return [[items[int(n)] for n in some["id"]] for some in both]


@pytest.mark.parametrize("turned", [False, True])
def test_patients_of_masks_are_known_whatever_source_comes_first(
    manifest_sets: Path, read_items: Callable[..., list[dict]], tmp_path: Path, turned: bool
) -> None:
    from medsight.training.data import biomedparse

    regions = load_source(Source("biomedparse", str(manifest_sets)))
    both = biomedparse.split_validation(regions, 0.3, 0)
    patients = sorted(set(both[1].filter(lambda row: row["dataset"] == "busi")["patient"]))
    assert patients
    asked = [{"image": f"other {p}.png", "dataset": "busi", "patient": p} for p in sorted({*regions["patient"]})]
    captions = [{"image": item["image"]} for item in asked]
    items = captions + asked if turned else asked + captions
    for seed in range(3):
        training, held = sides_of(tmp_path, read_items, items, seed, both)
        assert {f"other {p}.png" for p in patients} <= {item["image"] for item in held}
        assert not {item["image"] for item in held} & {item["image"] for item in training}


def test_a_patient_of_two_sources_is_on_one_side(read_items: Callable[..., list[dict]], tmp_path: Path) -> None:
    items = [{"image": f"{p}-x.png", "dataset": "one", "patient": f"{p}"} for p in range(10)]
    items += [
        {"image": f"{p}-{part}.png", "dataset": "two", "patient": f"of two {p}"} for p in range(10) for part in "xy"
    ]
    items += [{"image": f"unlike {p}.png", "dataset": "three", "patient": f"{p}"} for p in range(10)]
    told = set()
    for seed in range(6):
        training, held = sides_of(tmp_path, read_items, items, seed)
        sides = [
            {item["image"].split("-")[0] for item in some if item["dataset"] != "three"} for some in (training, held)
        ]
        assert sides[1] and not sides[0] & sides[1]
        # patients of one name in data sets that share no image are not one
        told.add({i["image"] for i in held if i["dataset"] == "three"} == {f"unlike {p}.png" for p in sides[1]})
    assert told == {False}


def test_embedded_images_are_told_apart_by_their_content(
    manifest_sets: Path, read_items: Callable[..., list[dict]], tmp_path: Path
) -> None:
    from medsight.training.data import biomedparse

    root = tmp_path / "listed"
    for number, path in enumerate(sorted(root.glob("*/train/*.png"))):  # no two alike
        Image.fromarray(np.full((12, 16), number, dtype=np.uint8)).save(path)
    regions = load_source(Source("biomedparse", str(manifest_sets)))
    both = biomedparse.split_validation(regions, 0.3, 0)
    rows = [
        {
            "id": f"{turn}",
            "images": [{"path": "picture.png", "bytes": Path(row["image"]["path"]).read_bytes()}],
            "messages": [{"role": "user", "content": "<image>Hm?"}, {"role": "assistant", "content": "Yes."}],
            **{name: row[name] for name in ("dataset", "modality", "site", "split", "patient")},
            "masks": [],
            "targets": [],
        }
        for row in regions
        for turn in range(3)
    ]
    conversations = Dataset.from_list(rows, features=CONVERSATION_FEATURES)
    for regions_beside in ([both], []):
        training, held = split(conversations, 0.3, 0, *regions_beside)
        sides = [{row["images"][0]["bytes"] for row in some} for some in (training, held)]
        assert len(held) and not sides[0] & sides[1] and len(training) + len(held) == len(rows)
        if regions_beside:
            assert sides[1] == {Path(row["image"]["path"]).read_bytes() for row in both[1]}


def test_what_cannot_be_validated_on_is_said(
    manifest_sets: Path, read_items: Callable[..., list[dict]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from medsight.training.data import biomedparse

    both = biomedparse.split_validation(load_source(Source("biomedparse", str(manifest_sets))), 0.3, 0)
    items = [{"id": str(n), "image": row["image"]["path"], "patient": str(n)} for n, row in enumerate(both[0])]
    read_items([{**item, "conversations": [ASKED, ANSWERED]} for item in items])
    rows = load_source(Source("llava", str(tmp_path / "items.json")))
    training, held = split(rows, 0.2, 0, both)
    assert len(training) == len(items) and not len(held) and "none is held out" in caplog.text


def test_patients_may_be_numbered_from_0(read_items: Callable[..., list[dict]]) -> None:
    found = read_items([{"id": "a", "image": "a.png", "conversations": [ASKED, ANSWERED], "patient": 0}])
    assert found[0]["patient"] == "0"


def test_the_same_patients_are_held_out_as_from_the_images(
    manifest_sets: Path, read_items: Callable[..., list[dict]], tmp_path: Path
) -> None:
    from medsight.training.data import biomedparse

    regions = load_source(Source("biomedparse", str(manifest_sets)))
    items = [
        {
            "id": f"{turn}",
            "image": row["image"]["path"],
            "conversations": [ASKED, ANSWERED],
            **{name: row[name] for name in ("dataset", "modality", "patient")},
        }
        for row in regions
        for turn in range(2)
    ]
    read_items(items)
    conversations = load_source(Source("llava", str(tmp_path / "items.json")))
    for seed in range(3):
        held = {row["image"]["path"] for row in biomedparse.split_validation(regions, 0.3, seed)[1]}
        assert {row["images"][0]["path"] for row in split(conversations, 0.3, seed)[1]} == held
