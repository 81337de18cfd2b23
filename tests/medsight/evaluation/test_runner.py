"""Answers to items: whatever the batch, the number of processes and the interruptions, the same file."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsight.evaluation import runner
from medsight.evaluation.benchmarks import load_benchmark
from medsight.evaluation.items import Item, read_items
from medsight.evaluation.predictions import decode_mask, read_predictions
from medsight.evaluation.runner import RunSettings, answer_items, load_for_evaluation, prepare_output
from tests.shared import shared_folder


SETTINGS = RunSettings(max_new_tokens=8)
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def items(regions: Path) -> list[Item]:
    return read_items(load_benchmark("segmentation"), regions)[0]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> tuple[Any, Any]:
    """The tiny model, led to begin every other answer with a region code: untrained, it would hardly cite one."""
    import torch

    model, processor = load_for_evaluation(tiny_checkpoint, SETTINGS, "cpu")
    first = model.config.region_code_start_id
    plain = model.generate

    class Codes:
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            # The prompt's own tokens decide, so that a row gets the same codes in any batch.
            wanted = ((input_ids * (input_ids != model.config.text_config.pad_token_id)).sum(1) % 5) < 3
            scores = scores.clone()
            scores[:, first : first + model.config.num_region_codes] += 50.0 * wanted[:, None].to(scores.dtype)
            return scores

    model.generate = lambda **inputs: plain(**inputs, logits_processor=[Codes()])
    assert model.dtype == torch.float64
    return model, processor


def answered(items: list[Item], checkpoint: tuple[Any, Any], output: Path, batch_size: int) -> bytes:
    prepare_output(output, {"run": 1}, overwrite=False)
    return answer_items(items, *checkpoint, output, SETTINGS, batch_size, progress=False).read_bytes()


def test_the_batch_size_does_not_show(items: list[Item], checkpoint: tuple[Any, Any], tmp_path: Path) -> None:
    alone = answered(items, checkpoint, tmp_path / "1", 1)
    assert answered(items, checkpoint, tmp_path / "4", 4) == answered(items, checkpoint, tmp_path / "9", 9) == alone
    records = [json.loads(line) for line in alone.splitlines()]
    assert [record["id"] for record in records] == [item.id for item in items]
    assert any(record["masks"] for record in records)


def test_masks_are_at_the_size_of_the_image(items: list[Item], checkpoint: tuple[Any, Any], tmp_path: Path) -> None:
    answered(items, checkpoint, tmp_path / "run", 4)
    for _, prediction in read_predictions(tmp_path / "run" / "predictions.jsonl"):
        assert len(prediction.masks) == len(prediction.codes) == len(prediction.scores) == len(prediction.groups)
        for index, mask in enumerate(prediction.masks):
            assert decode_mask(mask, "it", (16, 20)).shape == (16, 20)
            assert prediction.codes[index] in prediction.raw_text


@pytest.mark.parametrize("size", [1, 3, 9])
def test_reference_codes_are_those_of_all_masks_of_the_image_whatever_the_batch(
    items: list[Item], named_checkpoint: Path, size: int
) -> None:
    import torch

    from medsight.data.pictures import read_mask, read_picture
    from medsight.evaluation.reference_codes import ReferenceCodes
    from medsight.training.region_codes import assign_codes

    model, processor = load_for_evaluation(named_checkpoint, SETTINGS, "cpu")
    images = processor.image_processor

    def see(some: list[Item]) -> Any:
        pictures = [read_picture(item.images[0]) for item in some]
        return images(images=pictures, return_tensors="pt")["pixel_values"].to(model.dtype)

    references, found = ReferenceCodes(items, model, processor), []
    for start in range(0, len(items), size):
        found += references.of(items[start : start + size], see(items[start : start + size]))
    by_image: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        by_image.setdefault(item.images[0]["path"], []).append(index)
    assert [len(places) for places in by_image.values()] == [2, 2, 1, 1, 2, 1]
    for places in by_image.values():
        own = [items[index] for index in places if items[index].masks]
        with torch.no_grad():
            regions = model.get_region_features(see([items[places[0]]]))
        group = model.config.group_names[int(regions.group_logits.argmax())]
        assert [found[index][0] for index in places] == [group] * len(places)
        if own:
            size_of_image = read_picture(own[0].images[0]).size
            masks = np.stack([read_mask(item.masks[0], size_of_image) for item in own])
            placed = images.preprocess_masks(masks, output_size=(model.config.image_size,) * 2)
            k = 0 if own[0].modality == "CT" else 1
            (codes,) = assign_codes(model, regions, [placed], None, torch.tensor([k]))
            expected = [(model.config.region_code_token(k, code),) for code in codes.tolist()]
            assert [found[index][1] for index in places if items[index].masks] == expected
        assert [found[index][1] for index in places if not items[index].masks] == [()] * (len(places) - len(own))


def test_an_image_of_no_known_group_has_no_reference_codes(items: list[Item], named_checkpoint: Path) -> None:
    from dataclasses import replace

    from medsight.evaluation.reference_codes import ReferenceCodes

    model, processor = load_for_evaluation(named_checkpoint, SETTINGS, "cpu")
    known, foreign = items[0], replace(items[0], modality="PET")
    pixels = processor.image_processor(images=[runner.content_of(known)[0]["image"]] * 2, return_tensors="pt")
    found = ReferenceCodes([known, foreign], model, processor).of(
        [known, foreign], pixels["pixel_values"].to(model.dtype)
    )
    assert found[0][1] is not None and found[1][1] is None and found[0][0] == found[1][0] is not None


def test_a_mask_is_the_model_s_logits_resized_before_the_threshold(
    items: list[Item], checkpoint: tuple[Any, Any], tmp_path: Path
) -> None:
    import torch

    model, processor = checkpoint
    (prediction, *_) = [p for _, p in read_predictions_of(items, checkpoint, tmp_path) if p.masks]
    item = next(item for item in items if item.id == prediction.id)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": runner.content_of(item)}],
        tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt",
    ).to(dtype=model.dtype)  # fmt: skip
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    resized = torch.nn.functional.interpolate(out.mask_logits[0][None].float(), size=(20, 20), mode="bilinear")[0]
    # The 20 x 16 image sits in a square canvas, its margins above and below equal but for a pixel of the canvas.
    assert processor.image_processor.fit == "pad"
    expected = (resized[:, 2:18] > 0).numpy()
    given = np.stack([decode_mask(mask, "it") for mask in prediction.masks])
    assert given.any() and not given.all() and (expected == given).mean() > 0.98


def read_predictions_of(items: list[Item], checkpoint: tuple[Any, Any], folder: Path) -> list[Any]:
    answered(items, checkpoint, folder / "all", 3)
    return list(read_predictions(folder / "all" / "predictions.jsonl"))


def test_a_run_goes_on_where_it_stopped(
    items: list[Item], checkpoint: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answered(items, checkpoint, tmp_path / "whole", 2)
    broken = tmp_path / "broken"
    prepare_output(broken, {"run": 1}, overwrite=False)
    lines = whole.splitlines(keepends=True)
    (broken / "predictions.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:30])
    (broken / "predictions.part-0001.jsonl").write_bytes(lines[6])  # left by a second process
    asked = []
    answer_batch = runner.answer_batch

    def spy(batch: list[Item], *rest: Any) -> Any:
        asked.extend(item.id for item in batch)
        return answer_batch(batch, *rest)

    monkeypatch.setattr(runner, "answer_batch", spy)
    assert answered(items, checkpoint, broken, 2) == whole
    assert asked == [items[index].id for index in (3, 4, 5, 7, 8)]
    assert [path.name for path in broken.iterdir() if "part" in path.name or path.name.startswith(".")] == []


def test_predictions_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    prepare_output(tmp_path / "run", {"dtype": "float64", "benchmark": "a"}, overwrite=False)
    (tmp_path / "run" / "predictions.jsonl").write_text("{}\n")
    prepare_output(tmp_path / "run", {"dtype": "float64", "benchmark": "a"}, overwrite=False)
    with pytest.raises(FileExistsError, match="another benchmark; name another folder, or add --overwrite"):
        prepare_output(tmp_path / "run", {"dtype": "float64", "benchmark": "b"}, overwrite=False)
    prepare_output(tmp_path / "run", {"dtype": "float64", "benchmark": "b"}, overwrite=True)
    assert not (tmp_path / "run" / "predictions.jsonl").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="holds something else than an evaluation"):
        prepare_output(tmp_path / "other", {}, overwrite=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0: expected at least 1"),
        ({"threshold": 1.0}, "threshold 1.0: expected a probability"),
        ({"dtype": "int8"}, "dtype 'int8': expected one of float64"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunSettings(**values)


def test_an_unreadable_image_is_named(
    items: list[Item], checkpoint: tuple[Any, Any], tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    from dataclasses import replace

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    bad = replace(items[0], images=({"path": str(broken), "bytes": None},))
    with pytest.raises(ValueError, match="broken.png is not an image"):
        answered([bad], checkpoint, tmp_path / "run", 1)


def command(regions: Path, declared: Path, model: Path, output: Path) -> list[str]:
    arguments = ["--benchmark", declared, "--data", regions, "--output", output, "--model", model, "--device", "cpu"]
    options = ["--max-new-tokens", "8", "--batch-size", "1", "--allow-row-count"]
    return ["-m", "medsight.cli", "evaluate", *map(str, arguments), *options]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.mark.slow
def test_two_processes_and_a_kill_give_the_file_of_one(
    regions: Path, declare: Callable[..., Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    declared = declare("segmentation")
    one = [sys.executable, *command(regions, declared, tiny_checkpoint, tmp_path / "one")]
    subprocess.run(one, check=True, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    two = [*launch, *command(regions, declared, tiny_checkpoint, tmp_path / "two")]
    subprocess.run(two, check=True, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True)
    killed = [sys.executable, *command(regions, declared, tiny_checkpoint, tmp_path / "killed")]
    process = subprocess.Popen(killed, cwd=REPOSITORY, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    partial = tmp_path / "killed" / "predictions.jsonl"
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = partial.read_bytes().count(b"\n")
    subprocess.run(killed, check=True, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True)
    assert before < 9
    for name in ("predictions.jsonl", "metrics.json", "scores.jsonl"):
        contents = {(tmp_path / run / name).read_bytes() for run in ("one", "two", "killed")}
        assert len(contents) == 1, name


@pytest.mark.slow
def test_the_shipped_model_gives_real_images_the_same_answers_in_any_batch(tmp_path: Path) -> None:
    from medsight.checkpoint import shipped_checkpoint

    data = shared_folder("data", "segmentation")
    items, _ = read_items(load_benchmark("segmentation"), data)
    checkpoint = load_for_evaluation(shipped_checkpoint(), SETTINGS, "cpu")
    chosen = items[::19]
    alone = answered(chosen, checkpoint, tmp_path / "1", 1)
    assert answered(chosen, checkpoint, tmp_path / "8", 8) == alone
    assert any(json.loads(line)["masks"] for line in alone.splitlines())
