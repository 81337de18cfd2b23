"""VQA sets in the layouts in which they are distributed."""

import pickle
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from medsight.data.pictures import read_picture
from medsight.data.sources import Source, detect_layout, load_source


def read(layout: str, path: Path, **settings) -> list[dict]:
    assert detect_layout(path) == layout
    return list(load_source(Source(layout, str(path), **settings)))


def turns(row: dict) -> tuple[str, str]:
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


@pytest.fixture
def hub_folder(tmp_path: Path, draw_picture: Callable[..., Path]) -> Path:
    """Parquet files as the Hub's VQA copies are: the image's bytes, question and answer."""
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split, sides in (("train", (9, 9, 10)), ("test", (9,))):
        pictures = [draw_picture(tmp_path / f"{side}.png", (9, side)).read_bytes() for side in sides]
        asked = {"question": "Is it big?", "answer": "yes"}
        rows = [{"image": {"bytes": content, "path": None}, **asked} for content in pictures]
        path = tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
    return tmp_path / "hub"


def test_vqa_rad_as_shared(tmp_path: Path, write_json: Callable[..., Path]) -> None:
    common = {"image": "images/a.jpg", "answer": "Yes", "site": "HEAD", "split": "train"}
    rows = [
        {**common, "id": "0", "question": "Is it?", "image_in_test": True},
        {**common, "id": "1", "question": "Is it so?", "image_in_test": False},
        {**common, "id": "2", "question": "Was it?", "image_in_test": True, "split": "test"},
    ]
    write_json(tmp_path / "questions.jsonl", rows)
    first, second = read("vqa_rad", tmp_path)
    assert turns(first) == ("<image>\nIs it?", "Yes")
    assert first["images"][0]["path"] == str(tmp_path / "images/a.jpg") == first["patient"]
    assert (first["id"], first["dataset"], first["site"], first["split"]) == ("0", "vqa_rad", "HEAD", "train")
    assert [row["id"] for row in read("vqa_rad", tmp_path, where={"image_in_test": False})] == ["1"]
    assert [row["id"] for row in read("vqa_rad", tmp_path, split="test")] == ["2"]


def test_vqa_rad_as_published(tmp_path: Path, write_json: Callable[..., Path]) -> None:
    common = {"image_name": "synpic1.jpg", "image_organ": "CHEST", "answer_type": "OPEN", "question": "How many?"}
    rows = [
        {**common, "qid": 1, "phrase_type": "freeform", "answer": 3},
        {**common, "qid": 2, "phrase_type": "test_para", "answer": "two"},
    ]
    write_json(tmp_path / "VQA_RAD Dataset Public.json", rows)
    (row,) = read("vqa_rad", tmp_path)
    assert turns(row) == ("<image>\nHow many?", "3") and row["site"] == "CHEST" and row["id"] == "1"
    assert row["images"][0]["path"] == str(tmp_path / "VQA_RAD Image Folder" / "synpic1.jpg")
    assert [row["id"] for row in read("vqa_rad", tmp_path, split="test")] == ["2"]


def test_the_hubs_parquet_files(hub_folder: Path) -> None:
    rows = read("pathvqa", hub_folder)
    assert [turns(row) for row in rows] == [("<image>\nIs it big?", "yes")] * 3
    assert [read_picture(row["images"][0]).size for row in rows] == [(9, 9), (9, 9), (9, 10)]
    assert rows[0]["patient"] == rows[1]["patient"] != rows[2]["patient"]
    assert "train-00000-of-00001.parquet, row 3" in rows[2]["images"][0]["path"]
    assert len(list(load_source(Source("vqa_rad", str(hub_folder), split="test")))) == 1
    streamed = load_source(Source("pathvqa", str(hub_folder)), streaming=True)
    assert isinstance(streamed, datasets.IterableDataset) and list(streamed) == rows


def test_pathvqas_pickles_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "qas" / "train" / "train_qa.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps([{"question": "?"}]))
    for place in (tmp_path, path):
        with pytest.raises(ValueError, match=r"train_qa\.pkl.*parquet"):
            read("pathvqa", place)


@pytest.mark.parametrize("validation", ["validation.json", "validate.json"])
def test_slake_is_read_in_english_unless_asked(
    tmp_path: Path, write_json: Callable[..., Path], draw_picture: Callable[..., Path], validation: str
) -> None:
    common = {"img_id": 1, "img_name": "xmlab1/source.jpg", "modality": "MRI", "location": "Brain", "base_type": "vqa"}
    english = {**common, "qid": 5, "question": "Which organ?", "answer": "Brain", "q_lang": "en"}
    chinese = {**english, "qid": 6, "question": "这是什么?", "answer": "脑", "q_lang": "zh"}
    for name in ("train.json", validation, "test.json"):
        write_json(tmp_path / name, [english, chinese])
    draw_picture(tmp_path / "imgs" / "xmlab1" / "source.jpg")
    (row,) = read("slake", tmp_path)
    assert turns(row) == ("<image>\nWhich organ?", "Brain")
    assert (row["modality"], row["site"], row["split"], row["id"]) == ("MRI", "Brain", "train", "5")
    assert read_picture(row["images"][0]).size == (16, 12)
    (row,) = read("slake", tmp_path, where={"q_lang": "zh"}, split="val")
    assert turns(row)[1] == "脑" and row["split"] == "validation"
    assert [row["split"] for row in read("slake", tmp_path, split=None)] == ["test", "train", "validation"]


@pytest.fixture
def omnimedvqa(tmp_path: Path, write_json: Callable[..., Path]) -> tuple[Path, dict]:
    item = {"dataset": "ACRIMA", "question_id": "ACRIMA_0000", "image_path": "Images/ACRIMA/Im553.png"}
    item |= {"question": "What imaging technique is this?", "gt_answer": "Fundus imaging"}
    item |= {"option_A": "PET scan", "option_B": "CT scan", "option_C": "Fundus imaging"}
    folder = tmp_path / "OmniMedVQA"
    known = {**item, "modality_type": "Fundus Photography"}
    write_json(folder / "QA_information" / "Open-access" / "ACRIMA.json", [known])
    write_json(folder / "QA_information" / "Open-access" / "Chest CT Scan.json", [{**item, "modality": "CT"}])
    return folder, known


def test_omnimedvqa_lists_the_options(omnimedvqa: tuple[Path, dict]) -> None:
    folder, _ = omnimedvqa
    row, odd = read("omnimedvqa", folder, split="test")
    question = "<image>\nWhat imaging technique is this?\nA. PET scan\nB. CT scan\nC. Fundus imaging"
    assert turns(row) == (question, "Fundus imaging")
    assert row["images"][0]["path"] == str(folder / "Images/ACRIMA/Im553.png")
    assert (row["dataset"], row["modality"], odd["modality"]) == ("ACRIMA", "Fundus Photography", "CT")
    with pytest.raises(ValueError, match="no row of the split 'train'.*splits: test"):
        read("omnimedvqa", folder)


def test_an_answer_that_is_no_option_is_named(omnimedvqa: tuple[Path, dict], write_json: Callable[..., Path]) -> None:
    folder, item = omnimedvqa
    path = folder / "QA_information" / "Open-access" / "ACRIMA.json"
    write_json(path, [{**item, "gt_answer": "MRI"}])
    with pytest.raises(ValueError, match=r"ACRIMA\.json, item 1.*'MRI' is none of"):
        read("omnimedvqa", folder, split="test")


@pytest.mark.parametrize("missing", ["question", "answer", "image", "id"])
def test_a_question_without_a_field_is_named(tmp_path: Path, write_json: Callable[..., Path], missing: str) -> None:
    row = {"id": "0", "image": "a.png", "question": "Is it?", "answer": "Yes", "split": "train"}
    write_json(tmp_path / "questions.jsonl", [row, {key: row[key] for key in row if key != missing}])
    with pytest.raises(ValueError, match=rf"questions\.jsonl, line 2.*'{missing}'"):
        read("vqa_rad", tmp_path)
