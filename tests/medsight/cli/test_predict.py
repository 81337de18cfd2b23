"""`medsight predict` and `Predictor`: what is printed, what is written, and what is refused with nothing written."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from medsight import Predictor
from medsight.inference.prediction import describe, save_answer, to_parts
from tests.medsight.answers import SIZE, contents, same
from tests.medsight.scans.scan_files import png_claiming


@pytest.fixture
def refusal(predict: Callable, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `medsight predict` says when it ends with status 1."""

    def run(*arguments: object, **settings: object) -> str:
        capsys.readouterr()
        assert predict(*arguments, **settings) == 1
        return capsys.readouterr().err

    return run


def test_the_folder_holds_the_answer_a_mask_a_region_and_an_overlay_and_a_table_is_printed(
    predict: Callable, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "answer"
    assert predict(image_file, "--force-region", "--output", str(output)) == 0
    answer = json.loads((output / "answer.json").read_text("utf-8"))
    assert answer["prompt"] == "Segment the liver."
    assert answer["image"] == str(image_file)
    assert answer["size"] == {"width": SIZE[0], "height": SIZE[1]}
    assert answer["regions"]
    names = {"overlay.png", "regions.json"} | {region["mask"] for region in answer["regions"]}
    assert {path.name for path in output.iterdir()} == names | {"answer.json"} and set(answer["files"]) == names
    for region in answer["regions"]:
        assert region["code"] in answer["raw_text"]
        with Image.open(output / region["mask"]) as image:
            mask = np.asarray(image)
            assert image.size == SIZE and image.mode == "L"
        assert set(np.unique(mask)) <= {0, 255}
        assert region["area"] == (mask > 0).sum()
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if region["area"] else None
        assert region["box"] == box
        assert 0 <= region["score"] <= 1
    with Image.open(output / "overlay.png") as overlay:
        assert max(overlay.size) >= 512
    lines = capsys.readouterr().out.splitlines()
    header = next(index for index, line in enumerate(lines) if "code" in line and "score" in line)
    column = lines[header].index("code")
    for region, line in zip(answer["regions"], lines[header + 1 :], strict=False):
        assert line[column:].startswith(region["code"])
    assert lines[0] == answer["text"].split("\n")[0] and str(output) in lines[-1]


def test_a_cut_answer_and_one_without_regions_say_so(predictor: Predictor, tmp_path: Path) -> None:
    cut = predictor(Image.new("L", SIZE), "Where?", max_new_tokens=1)
    ended = replace(cut, answer=replace(cut.answer, is_complete=True))
    assert (cut.to_dict()["is_complete"], ended.to_dict()["is_complete"]) == (False, True)
    assert "--max-new-tokens" in cut.to_table() and "--max-new-tokens" not in ended.to_table()
    several = "\n".join(
        map(str, to_parts(describe([cut, replace(ended, slice_index=4), replace(cut, slice_index=7)])))
    )
    assert "of slice 0, 7;" in several
    earlier = cut.to_dict()
    del earlier["is_complete"]  # of a version that did not know
    assert to_parts(earlier) == to_parts({**earlier, "is_complete": None})
    bare = replace(cut, answer=replace(cut.answer, regions=[]))
    bare.save(tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"answer.json", "overlay.png", "regions.json"}
    assert "cites no region" in bare.to_table()
    hostile = replace(cut, answer=replace(cut.answer, text="a\x1b[2Jb\x07 ü 肝\nnext"))
    assert hostile.to_table().startswith("a\ufffd[2Jb\ufffd ü 肝\nnext\n")


def test_the_output_is_named_after_the_image_by_default_and_may_be_the_working_folder(
    predict: Callable, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(image_file) == 0
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["scan-medsight"]
    shutil.rmtree(tmp_path / "here" / "scan-medsight")
    assert predict(image_file, "--output", ".") == 0
    assert (tmp_path / "here" / "answer.json").is_file() and "Written to ./" in capsys.readouterr().out


def test_python_gives_the_regions_that_the_command_writes(
    predict: Callable, predictor: Predictor, image_file: Path, tmp_path: Path
) -> None:
    with Image.open(image_file) as image:
        from_memory = predictor(image, "Segment the liver.", max_new_tokens=6, force_region=True)
    prediction = predictor(image_file, "Segment the liver.", max_new_tokens=6, force_region=True)
    assert same(prediction, from_memory)
    assert predict(image_file, "--force-region", "--output", str(tmp_path / "command")) == 0
    prediction.save(tmp_path / "python")
    python, command = contents(tmp_path / "python"), contents(tmp_path / "command")
    one, other = (json.loads(files.pop("answer.json")) for files in (python, command))
    assert python == command and one.pop("run") is None and other.pop("run")["threshold"] == 0.5
    assert one == other


def test_groups_and_threshold_decide_on_regions(predictor: Predictor, image_file: Path) -> None:
    name = predictor.model.config.group_names[1]
    areas = []
    for allowed, threshold in (([name], 0.05), ([1], 0.5), ([1], 0.95)):
        settings = {"allowed_groups": allowed, "threshold": threshold, "force_region": True}
        regions = predictor(image_file, "Where?", max_new_tokens=8, **settings).answer.regions
        assert {region.group_name for region in regions} == {name}
        areas.append(regions[0].area)
    assert areas == sorted(areas, reverse=True)


def test_a_finished_answer_is_shown_again_without_a_model(
    predict: Callable, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    output = str(tmp_path / "out")
    assert predict(image_file, "--output", output, "--force-region") == 0
    first = capsys.readouterr().out
    monkeypatch.setattr("medsight.inference.predictor.Predictor", None)
    assert predict(image_file, "--output", output, "--force-region") == 0
    assert capsys.readouterr().out == first.replace("Written to", "Answered before:")


@pytest.mark.parametrize("foreign", ["thesis.docx", "answer.json.bak", "maskfile.png"])
def test_a_folder_with_other_files_is_never_replaced(
    foreign: str, refusal: Callable, image_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "answer.json").write_text('{"prompt": "", "volumes_ml": {}, "run": null, "regions": [], "files": []}')
    (output / foreign).write_text("precious")
    before = contents(tmp_path)
    assert foreign in refusal(image_file, "--output", str(output), "--overwrite")
    assert contents(tmp_path) == before


def test_a_failure_while_writing_leaves_the_earlier_answer_as_it_was(
    predictor: Predictor, image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prediction = predictor(image_file, "Where?", max_new_tokens=6, force_region=True)
    prediction.save(tmp_path / "out")
    before = contents(tmp_path)

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("medsight.inference.prediction.overlay", fail)
    for output in (tmp_path / "out", tmp_path / "other"):
        with pytest.raises(OSError, match="disk full"):
            prediction.save(output, overwrite=True)
    assert contents(tmp_path) == before


def picture(path: Path, seed: int, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_a_batch_gives_the_answers_of_single_calls(tiny_checkpoint: Path, tmp_path: Path, batch_size: int) -> None:
    predictor = Predictor(tiny_checkpoint, device="cpu")
    predictor.model.double()
    images = [picture(tmp_path / f"{n}.png", n, (40 + 9 * n, 30 + n)) for n in range(5)]
    prompts = ["?", "Segment the liver.", "Where is it, and what is beside it?", "Why?", "Segment " + "all " * 12]
    settings = {"max_new_tokens": 6, "force_region": True}
    single = [predictor(image, prompt, **settings) for image, prompt in zip(images, prompts, strict=True)]
    batched = predictor(images, prompts, batch_size=batch_size, **settings)
    assert len({prediction.answer.raw_text for prediction in single}) > 1
    assert all(same(one, other) for one, other in zip(single, batched, strict=True))
    together = predictor(images, prompts[1], batch_size=batch_size, **settings)
    assert same(together[1], single[1]) and [one.prompt for one in together] == [prompts[1]] * 5


def test_a_batch_of_wrong_size_and_an_empty_prompt_are_refused(predictor: Predictor, image_file: Path) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        predictor(image_file, "  \n")
    with pytest.raises(ValueError, match="no UTF-8"):  # as a shell passes on bytes of another encoding
        predictor(image_file, b"Wo ist die F\xfc".decode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="got 2 for 1 images"):
        predictor([image_file], ["a", "b"])
    with pytest.raises(ValueError, match="batch_size 0"):
        predictor([image_file], "a", batch_size=0)
    with pytest.raises(ValueError, match="several prompts for one image"):
        predictor(image_file, ["a", "b"])  # type: ignore[call-overload]


NAMES = ("b.png", "a b;$(rm).png", "..hidden-ish..png", "UPPER.png", "upper.jpg", "con.png")  # not to be trusted


def test_a_folder_is_answered_image_by_image_and_what_is_broken_is_reported_at_the_end(
    predict: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study"
    for number, name in enumerate(NAMES):
        picture(study / name, number)
    (study / "broken.png").write_bytes(png_claiming(400, 400))
    (study / "notes.txt").write_text("not an image")
    output = tmp_path / "answers"
    assert predict(study, "--output", str(output), "--json", "--batch-size", "4") == 1
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert {Path(line["image"]).name for line in lines} == {*NAMES} - {"..hidden-ish..png"}
    names = {path.name for path in output.iterdir()}
    assert len(names) == len(lines) and {Path(line["output"]).name for line in lines} == names
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names)
    assert {"b", "a_b_rm", "image-con"} < names and sum(name.lower().startswith("upper-") for name in names) == 2
    assert "notes.txt" in captured.err and "broken.png is damaged" in captured.err
    assert captured.err.endswith("medsight: error: 1 of 6 images could not be answered (named above)\n")


def test_an_answer_that_cannot_be_written_does_not_stop_the_others(
    predict: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        picture(tmp_path / "study" / f"{number}.png", number)
    (tmp_path / "all").symlink_to(tmp_path / "study")

    def full(predictions: list, folder: Path, *arguments: object) -> Path:
        if folder.name == "1":
            raise OSError(28, "No space left on device", str(folder))
        return save_answer(predictions, folder, *arguments)

    monkeypatch.setattr("medsight.inference.prediction.save_answer", full)
    assert predict(tmp_path / "study", str(tmp_path / "all"), "--output", str(tmp_path / "out")) == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0", "2"}
    error = capsys.readouterr().err
    assert f"left out, another name of an image: 3 ({tmp_path / 'all' / '0.png'}" in error
    assert f"{tmp_path / 'study' / '1.png'}: [Errno 28]" in error and "1 of 3 images" in error


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_utf_8_is_answered_all_the_same(
    predict: Callable, predictor: Predictor, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = image_file.rename(tmp_path / "M\udcfcller.png")
    assert predict(image, "--formats", "png,coco", "--force-region", "--output", str(tmp_path / "out")) == 0
    assert json.loads((tmp_path / "out" / "regions.json").read_text("utf-8"))["scan"]["name"] == "M\ufffdller.png"
    predictor(image, "Where?", max_new_tokens=6).save(tmp_path / "python")
    for folder in ("out", "python"):
        answer = json.loads((tmp_path / folder / "answer.json").read_text("utf-8"))
        assert answer["image"].endswith("M\ufffdller.png")


def test_deidentifying_changes_nothing_of_the_caller_s(predictor: Predictor, image_file: Path, tmp_path: Path) -> None:
    prediction = predictor(image_file, "Where?", max_new_tokens=6, force_region=True)
    prediction.save(tmp_path / "before")
    prediction.save(tmp_path / "nameless", deidentify=True)
    prediction.save(tmp_path / "after")
    assert contents(tmp_path / "after") == contents(tmp_path / "before") != contents(tmp_path / "nameless")


def test_an_interrupted_run_resumes_and_gives_what_an_unbroken_one_gives(
    predict: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        picture(tmp_path / "study" / f"{number}.png", number)
    arguments = (tmp_path / "study", "--force-region", "--batch-size", "2")
    assert predict(*arguments, "--output", str(tmp_path / "unbroken")) == 0
    answer, batches = Predictor.answer, []

    def counting(self: Predictor, conversations: list, **settings: object) -> list:
        batches.append(len(conversations))
        if sum(batches) > limit:
            raise KeyboardInterrupt
        return answer(self, conversations, **settings)

    monkeypatch.setattr(Predictor, "answer", counting)
    limit = 3
    assert predict(*arguments, "--output", str(tmp_path / "broken")) == 130
    assert {path.name for path in (tmp_path / "broken").iterdir()} == {"0", "1"}
    limit, batches = 5, []
    capsys.readouterr()
    assert predict(*arguments, "--output", str(tmp_path / "broken"), "--json") == 0
    assert sum(batches) == 3 and len(capsys.readouterr().out.splitlines()) == 5
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--prompt", "Another?"), "prompt"),
        (("--threshold", "0.4"), "threshold"),
        (("--formats", "png,coco"), "formats"),
        (("--max-new-tokens", "7"), "max_new_tokens"),
        ((), "image"),
        ((), "model_sha256"),
    ],
)
def test_an_answer_of_other_settings_is_replaced_only_on_request_and_then_completely(
    changed: tuple[str, ...], named: str, predict: Callable, refusal: Callable, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    picture(tmp_path / "study" / "0.png", 0)
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    arguments = (tmp_path / "study", "--output", str(tmp_path / "out"), "--force-region")
    assert predict(*arguments, model=model) == 0
    picture(tmp_path / "study" / "1.png", 1)
    before = contents(tmp_path / "out")
    if named == "image":
        picture(tmp_path / "study" / "0.png", 9)
    if named == "model_sha256":
        weights = load_file(model / "model.safetensors")
        save_file({name: weight + 0.01 for name, weight in weights.items()}, model / "model.safetensors")
    error = refusal(*arguments, *changed, model=model)
    assert f"an answer of another {named};" in error and "--overwrite" in error and str(tmp_path / "out/0") in error
    assert contents(tmp_path / "out") == before
    assert predict(*arguments, *changed, "--overwrite", model=model) == 0
    assert (tmp_path / "out" / "1" / "answer.json").is_file()
    after = json.loads((tmp_path / "out" / "0" / "answer.json").read_text("utf-8"))
    assert {path.name for path in (tmp_path / "out" / "0").iterdir()} == {"answer.json", *after["files"]}


def test_patterns_files_and_folders_add_up_without_earlier_answers(
    predict: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/0.png", "a/1.png", "b/2.png", "3.png"):
        picture(tmp_path / name, 0)
    assert predict(tmp_path / "3.png", "--output", str(tmp_path / "b" / "answer")) == 0
    capsys.readouterr()
    assert predict(tmp_path / "[ab]*", str(tmp_path / "3.png"), str(tmp_path / "a"), "--json") == 0
    captured = capsys.readouterr()
    images = [Path(json.loads(line)["image"]).name for line in captured.out.splitlines()]
    assert images == ["0.png", "1.png", "2.png", "3.png"]
    assert {path.name for path in (tmp_path / "here" / "medsight-answers").iterdir()} == {"0", "1", "2", "3"}
    assert predict(tmp_path / "b" / "*", "--output", str(tmp_path / "other")) == 0
    assert "left out, no image: 1" in capsys.readouterr().err
    assert predict(tmp_path / "x*") == 1 and "nothing matches" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"no image at all\n", png_claiming(0, 10), png_claiming(400, 400)])
def test_a_bad_image_is_named_in_one_line_and_nothing_is_written(
    content: bytes | None, refusal: Callable, tmp_path: Path
) -> None:
    image = tmp_path / "bad.png"
    if content is not None:
        image.write_bytes(content)
    before = contents(tmp_path)
    error = refusal(image, "--output", str(tmp_path / "out"))
    assert error.startswith("medsight: error: ") and error.count("\n") == 1 and str(image) in error
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "culprit"),
    [
        ("--max-new-tokens", "0", "max_new_tokens 0"),
        ("--threshold", "1.5", "threshold 1.5"),
        ("--plane", "sagittal", "plane='sagittal' is for NIfTI volumes"),
        ("--formats", "gif", "gif"),
        ("--formats", "nifti", "scan.png: nifti needs"),
        ("--formats", "dicom-seg", "scan.png is not DICOM"),
        ("--device", "quantum", "quantum"),
        ("--allowed-groups", "spleen of a dragon", "spleen of a dragon"),
    ],
)
def test_a_bad_option_is_named_and_nothing_is_written(
    option: str,
    value: str,
    culprit: str,
    refusal: Callable,
    image_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if option not in ("--device", "--allowed-groups"):  # which are held against a model
        monkeypatch.setattr("medsight.inference.predictor.Predictor", None)
    error = refusal(image_file, option, value, "--output", str(tmp_path / "out"))
    assert error.startswith("medsight: error: ") and culprit in error
    assert not (tmp_path / "out").exists()


def test_a_question_that_leaves_no_place_for_its_answer_is_refused(
    refusal: Callable, predictor: Predictor, image_file: Path, tmp_path: Path
) -> None:
    limit = predictor.model.config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=f"takes [0-9]+ tokens, and with 6 .* the model's {limit}"):
        predictor(image_file, "Where? " * limit, max_new_tokens=6)
    error = refusal(image_file, "--max-new-tokens", str(limit), "--output", str(tmp_path / "out"))
    assert f"{limit} for the answer" in error and not (tmp_path / "out").exists()
