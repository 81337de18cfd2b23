"""Conversations of the LLaVA type, plain and grounded: turns, markers, codes and masks must belong together."""

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

from medsight.data.conversations import CodeMaskError, check_conversation, cited_codes, code_images
from medsight.data.sources import Source, iterate, load_source
from tests.medsight.data.conftest import ANSWERED, ASKED


def test_an_array_and_lines_give_the_same_rows(read_items: Callable[..., Dataset], tmp_path: Path) -> None:
    items = [
        {"id": f"p{number}", "image": [f"a{number}.jpg", f"b{number}.jpg"], "conversations": [ASKED, ANSWERED]}
        for number in range(5)
    ]
    rows = read_items(items)
    assert list(rows) == list(read_items(items, "items.jsonl"))
    assert [image["path"] for image in rows[3]["images"]] == [str(tmp_path / "a3.jpg"), str(tmp_path / "b3.jpg")]
    assert rows[3]["id"] == "p3" and rows[3]["masks"] == [] and rows[3]["split"] == "train"
    elsewhere = read_items(items, images=str(tmp_path / "pictures"))
    assert elsewhere[0]["images"][0]["path"] == str(tmp_path / "pictures" / "a0.jpg")


def test_missing_markers_go_before_the_first_question(read_items: Callable[..., Dataset]) -> None:
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


def test_origins_are_taken_from_the_published_fields(read_items: Callable[..., Dataset], tmp_path: Path) -> None:
    turns = [ASKED, ANSWERED]
    rows = read_items(
        [
            {"id": 1, "image": "a.png", "conversations": turns, "modality": "CT", "body_part": "Chest"},
            {"id": 2, "image": "a.png", "conversatons": turns, "domain": {"mri": True, "gross": False}},
            {"id": 3, "image": "a.png", "conversations": turns, "patient": 0, "dataset": "d", "split": "val"},
        ],
        split=None,
    )
    assert (rows[0]["modality"], rows[0]["site"], rows[1]["modality"]) == ("CT", "Chest", "mri")
    assert rows[0]["patient"] == rows[1]["patient"] == str(tmp_path / "a.png")
    assert (rows[2]["patient"], rows[2]["dataset"], rows[2]["split"]) == ("0", "d", "validation")


def test_masks_follow_the_codes_through_mask_orders(grounded_file: Path) -> None:
    grounded, plain = load_source(Source("grounded", str(grounded_file)))
    assert cited_codes(grounded["messages"]) == ["[C0_7]", "[C0_16]", "[C0_16]"]
    assert [Path(mask["path"]).name for mask in grounded["masks"]] == ["spleen.png", "liver.png", "liver.png"]
    assert grounded["targets"] == ["", "", ""] and plain["masks"] == []


BAD_ITEMS = {
    "more markers than images": ({"image": "a.png", "conversations": [{**ASKED, "value": "<image><image>"}]}, "2 <im"),
    "marker without image": ({"conversations": [{**ASKED, "value": "<image> Hm?"}]}, "1 <image>.*0 image"),
    "marker in an answer": ({"image": "a", "conversations": [{**ASKED, "value": "<image>"}, "<image>"]}, "outside"),
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
    read_items: Callable[..., Dataset], tmp_path: Path, item: dict, message: str
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
    assert cited_codes(messages) == ["[C0_1]", "[SEG]", "[C1_12]"]
    row = {"messages": messages, "images": [{}] * 3, "masks": [{}] * 3, "targets": ["a"]}
    with pytest.raises(ValueError, match="here: 1 target.*3 mask"):
        check_conversation(row, "here")
