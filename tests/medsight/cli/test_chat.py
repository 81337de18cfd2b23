"""`medsight chat`: turns see the ones before them, stream, and are saved one by one."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medsight import Predictor, cli
from medsight.checkpoint import SHIPPED_FOLDER
from medsight.cli.chat import Conversation
from medsight.inference.predictor import read_slices, user_turn
from medsight.inference.settings import AnswerSettings
from tests.medsight.scans.scan_files import nifti_bytes


PROMPTS = ["Segment the liver.", "And the spleen?", "Why?"]
SETTINGS = AnswerSettings(max_new_tokens=6, force_region=True)


@pytest.fixture
def chat(
    tiny_checkpoint: Path, image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)

    def run(typed: str, *options: str, image: Path = image_file) -> int:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        arguments = [str(image), "--model", str(tiny_checkpoint), "--device", "cpu", "--max-new-tokens", "6"]
        return cli.main(["chat", *arguments, "--force-region", *options])

    return run


def test_each_turn_is_answered_after_those_before_it_that_did_not_fail(predictor: Predictor, image_file: Path) -> None:
    image = next(read_slices(image_file))
    streamed: list[str] = []
    conversation = Conversation(predictor, image, "scan", SETTINGS)
    answers = [conversation.ask(prompt, streamed.append).answer for prompt in PROMPTS]
    with pytest.raises(ValueError, match="prompt is empty"):
        conversation.ask("  ")
    assert "".join(streamed) == "".join(answer.raw_text for answer in answers)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 3
    for answer in answers:
        assert all(region.image_index == 0 and region.mask.shape == (45, 70) for region in answer.regions)
    first = predictor(image_file, PROMPTS[0], max_new_tokens=6, force_region=True).answer
    assert answers[0].raw_text == first.raw_text
    inputs = predictor.processor.apply_chat_template(
        conversation.messages, tokenize=True, return_dict=True, return_tensors="pt"
    )
    text = predictor.processor.tokenizer.decode(inputs["input_ids"][0])
    assert all(answer.raw_text.strip() in text for answer in answers)


@pytest.mark.skipif(not SHIPPED_FOLDER.is_dir(), reason="this tree has no shipped model")
def test_later_turns_read_only_what_is_new_and_are_answered_alike(image_file: Path) -> None:
    predictor = Predictor(device="cpu")
    predictor.model.double()
    conversation = Conversation(predictor, next(read_slices(image_file)), "scan", AnswerSettings(max_new_tokens=40))
    read: list[int] = []
    predictor.model.model.register_forward_pre_hook(
        lambda module, arguments, inputs: read.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    for number, prompt in enumerate(["Segment the nucleus.", "Is there a nucleus?", "Where is it?"]):
        asked = [*conversation.messages, user_turn(prompt, None if number else conversation.image.image)]
        read.clear()
        answer = conversation.ask(prompt).answer
        (columns,) = (width for width in read if width > 1)
        (afresh,) = predictor.answer([asked], max_new_tokens=40)
        assert number == 0 or columns < predictor.model.config.image_seq_length
        assert (answer.raw_text, len(answer.regions)) == (afresh.raw_text, len(afresh.regions))
        for region, expected in zip(answer.regions, afresh.regions, strict=True):
            assert region.mask.equal(expected.mask) and region.score == pytest.approx(expected.score, abs=1e-9)


def test_turns_are_printed_and_saved_one_by_one(
    chat: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat("Segment the liver.\n\nAnd the spleen?\n") == 0
    captured = capsys.readouterr()
    folder = tmp_path / "scan-chat"
    assert {path.name for path in folder.iterdir()} == {"turn-01", "turn-02"}
    for name, prompt in (("turn-01", "Segment the liver."), ("turn-02", "And the spleen?")):
        answer = json.loads((folder / name / "answer.json").read_text("utf-8"))
        assert answer["prompt"] == prompt and answer["regions"]
        assert all((folder / name / file).is_file() for file in answer["files"])
        assert answer["regions"][0]["code"] in captured.out and f"Saved to scan-chat/{name}/" in captured.out
    assert ">" not in captured.err
    assert chat("Again?\n") == 1
    assert "scan-chat is not empty" in capsys.readouterr().err


def test_a_volume_is_cut_along_the_plane(chat: Callable, tmp_path: Path) -> None:
    pytest.importorskip("nibabel")
    voxels = np.random.default_rng(0).integers(0, 900, (10, 12, 6), dtype=np.int16)
    (tmp_path / "v.nii").write_bytes(nifti_bytes(voxels))
    view = ("--plane", "sagittal", "--slice", "9", "--output", "out")
    assert chat("Where?\n", *view, image=tmp_path / "v.nii") == 0
    answer = json.loads((tmp_path / "out" / "turn-01" / "answer.json").read_text("utf-8"))
    assert (answer["scan"]["plane"], answer["slice"]) == ("sagittal", 9)
    assert answer["size"] == {"width": 12, "height": 6}


def test_json_is_a_line_a_turn(chat: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat("Segment the liver.\nWhy?", "--json", "--output", "out") == 0
    turns = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [turn["prompt"] for turn in turns] == ["Segment the liver.", "Why?"]
    assert [turn["output"] for turn in turns] == ["out/turn-01", "out/turn-02"]


def test_what_no_conversation_can_be_about_is_refused_before_anything_is_asked(
    chat: Callable, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr("medsight.inference.predictor.Predictor", None)
    assert chat("Where?\n", "--formats", "png,nifti") == 1
    assert "nifti needs an evenly spaced voxel grid" in capsys.readouterr().err
    (tmp_path / "two").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "two" / name).write_bytes(image_file.read_bytes())
    assert chat("Where?\n", image=tmp_path / "two") == 1
    assert "holds 2 images" in capsys.readouterr().err
