"""Answers to cases: whatever the batch, the number of processes and the interruptions, the same file."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from medsight import cli
from medsight.data.pictures import read_mask, read_picture
from medsight.evaluation import runner
from medsight.evaluation.benchmarks import load_benchmark
from medsight.evaluation.cases import Case
from medsight.evaluation.predictions import decode_mask, read_predictions
from medsight.evaluation.readers import read_cases
from medsight.evaluation.reference_codes import ReferenceCodes
from medsight.evaluation.runner import RunSettings, answer_cases, load_for_evaluation, prepare_output
from medsight.inference.code_assignment import assign_codes
from processing_medsight.region_codes_medsight import parse_region_code
from tests.shared import shared_folder


SETTINGS = RunSettings(max_new_tokens=8)
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def cases(regions: Path) -> list[Case]:
    return read_cases(load_benchmark("segmentation"), regions)[0]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> tuple[Any, Any]:
    """The tiny model, led to begin every other answer with a region code: untrained, it would hardly cite one."""
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


def answered(cases: list[Case], checkpoint: tuple[Any, Any], output: Path, batch_size: int) -> bytes:
    prepare_output(output, {"run": 1}, overwrite=False)
    return answer_cases(cases, *checkpoint, output, SETTINGS, batch_size).read_bytes()


def test_the_batch_size_does_not_show_and_masks_are_at_the_size_of_the_image(
    cases: list[Case], checkpoint: tuple[Any, Any], tmp_path: Path
) -> None:
    alone = answered(cases, checkpoint, tmp_path / "1", 1)
    assert answered(cases, checkpoint, tmp_path / "4", 4) == answered(cases, checkpoint, tmp_path / "9", 9) == alone
    predictions = [prediction for _, prediction in read_predictions(tmp_path / "4" / "predictions.jsonl")]
    assert [prediction.id for prediction in predictions] == [case.id for case in cases]
    assert any(prediction.masks for prediction in predictions)
    for prediction in predictions:
        assert len(prediction.masks) == len(prediction.codes) == len(prediction.scores) == len(prediction.groups)
        for mask, code in zip(prediction.masks, prediction.codes, strict=True):
            assert decode_mask(mask, "it", (16, 20)).shape == (16, 20) and code in prediction.raw_text


@pytest.mark.parametrize("size", [1, 3, 9])
def test_reference_codes_are_those_of_all_masks_of_the_image_whatever_the_batch(
    cases: list[Case], named_checkpoint: Path, size: int
) -> None:
    cases = [*cases, replace(cases[0], modality="PET")]  # of no known group
    model, processor = load_for_evaluation(named_checkpoint, SETTINGS, "cpu")
    images = processor.image_processor

    def see(some: list[Case]) -> Any:
        pictures = [read_picture(case.images[0]) for case in some]
        return images(images=pictures, return_tensors="pt")["pixel_values"].to(model.dtype)

    references, found = ReferenceCodes(cases, model, processor), []
    for start in range(0, len(cases), size):
        found += references.of(cases[start : start + size], see(cases[start : start + size]))
    foreign = found.pop()
    assert foreign == (found[0][0], None) and cases.pop()
    by_image: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        by_image.setdefault(case.images[0]["path"], []).append(index)
    assert [len(places) for places in by_image.values()] == [2, 2, 1, 1, 2, 1]
    for places in by_image.values():
        own = [cases[index] for index in places if cases[index].masks]
        with torch.no_grad():
            regions = model.get_region_features(see([cases[places[0]]]))
        group = model.config.group_names[int(regions.group_logits.argmax())]
        assert [found[index][0] for index in places] == [group] * len(places)
        if own:
            size_of_image = read_picture(own[0].images[0]).size
            masks = np.stack([read_mask(case.masks[0], size_of_image) for case in own])
            placed = images.preprocess_masks(masks, output_size=(model.config.image_size,) * 2)
            k = 0 if own[0].modality == "CT" else 1
            (codes,) = assign_codes(model, regions, [placed], None, torch.tensor([k]))
            expected = [(model.config.region_code_token(k, code),) for code in codes.tolist()]
            assert [found[index][1] for index in places if cases[index].masks] == expected
        assert [found[index][1] for index in places if not cases[index].masks] == [()] * (len(places) - len(own))


def test_a_mask_is_the_model_s_logits_resized_before_the_threshold(
    cases: list[Case], checkpoint: tuple[Any, Any], tmp_path: Path
) -> None:
    model, processor = checkpoint
    (prediction, *_) = [p for _, p in read_predictions_of(cases, checkpoint, tmp_path) if p.masks]
    case = next(case for case in cases if case.id == prediction.id)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": runner.content_of(case)}],
        tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt",
    ).to(dtype=model.dtype)  # fmt: skip
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    resized = torch.nn.functional.interpolate(out.mask_logits[0][None].float(), size=(20, 20), mode="bilinear")[0]
    # The 20 x 16 image sits in a square canvas, its margins above and below equal but for a pixel of the canvas.
    assert processor.image_processor.fit == "pad"
    expected = (resized[:, 2:18] > 0).numpy()
    given = np.stack([decode_mask(mask, "it", (16, 20)) for mask in prediction.masks])
    assert given.any() and not given.all() and (expected == given).mean() > 0.98


def test_masks_of_codes_alone_are_a_run_of_their_own(
    cases: list[Case], checkpoint: tuple[Any, Any], tmp_path: Path
) -> None:
    model, processor = checkpoint
    from_states = [p for _, p in read_predictions_of(cases, checkpoint, tmp_path)]
    settings = replace(SETTINGS, masks_from="codes")
    alone, together = (
        [
            prediction
            for start in range(0, len(cases), size)
            for prediction in runner.answer_batch(
                cases[start : start + size], model, processor, settings, ReferenceCodes(cases, model, processor)
            )
        ]
        for size in (1, 4)
    )
    assert alone == together
    for states, codes in zip(from_states, alone, strict=True):
        assert (codes.id, codes.raw_text, list(codes.codes)) == (states.id, states.raw_text, list(states.codes))
        assert len(codes.masks) == len(states.masks) and set(codes.scores) <= {None}
    assert [p.masks for p in alone if p.masks] != [p.masks for p in from_states if p.masks]
    prediction = next(prediction for prediction in alone if prediction.masks)
    case = next(case for case in cases if case.id == prediction.id)
    pixels = processor.image_processor(images=[runner.content_of(case)[0]["image"]], return_tensors="pt")
    codes = torch.tensor([parse_region_code(code) for code in prediction.codes])
    with torch.no_grad():
        (logits,) = model.region_model.decode_codes(
            code_indices=[codes], pixel_values=pixels["pixel_values"].to(model.dtype)
        )
    expected = processor.image_processor.post_process_masks([logits], [(16, 20)], 0.5)[0].numpy()
    assert np.array_equal(np.stack([decode_mask(mask, "it", (16, 20)) for mask in prediction.masks]), expected)


def read_predictions_of(cases: list[Case], checkpoint: tuple[Any, Any], folder: Path) -> list[Any]:
    answered(cases, checkpoint, folder / "all", 3)
    return list(read_predictions(folder / "all" / "predictions.jsonl"))


def test_a_run_goes_on_where_it_stopped(
    cases: list[Case], checkpoint: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answered(cases, checkpoint, tmp_path / "whole", 2)
    broken = tmp_path / "broken"
    prepare_output(broken, {"run": 1}, overwrite=False)
    lines = whole.splitlines(keepends=True)
    (broken / "predictions.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:30])
    (broken / "predictions.part-0001.jsonl").write_bytes(lines[6])  # left by a second process
    asked = []
    answer_batch = runner.answer_batch

    def spy(batch: list[Case], *rest: Any) -> Any:
        asked.extend(case.id for case in batch)
        return answer_batch(batch, *rest)

    monkeypatch.setattr(runner, "answer_batch", spy)
    assert answered(cases, checkpoint, broken, 2) == whole
    assert asked == [cases[index].id for index in (3, 4, 5, 7, 8)]
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


def test_an_unreadable_image_is_named(
    cases: list[Case], checkpoint: tuple[Any, Any], tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    bad = replace(cases[0], images=({"path": str(broken), "bytes": None},))
    with pytest.raises(ValueError, match="broken.png is not an image"):
        answered([bad], checkpoint, tmp_path / "run", 1)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_two_processes_and_a_kill_give_the_files_of_one(
    regions: Path, declare: Callable[..., Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    places = ["--benchmark", declare("segmentation"), "--data", regions, "--model", tiny_checkpoint]
    options = ["--device", "cpu", "--max-new-tokens", "8", "--batch-size", "1", "--allow-row-count", "--output"]
    verb = ["evaluate", *map(str, [*places, *options])]
    assert cli.main([*verb, str(tmp_path / "one")]) == 0
    two = ["-m", "medsight.cli", *verb, str(tmp_path / "two")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *two]
    file = REPOSITORY / "training" / "accelerate" / "cpu.yaml"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), *two]
    running: dict[str, Any] = {"cwd": REPOSITORY, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    process = subprocess.Popen(torchrun, stderr=subprocess.DEVNULL, **running)
    parts = [tmp_path / "two" / f"predictions.part-{rank:04d}.jsonl" for rank in range(2)]
    deadline = time.monotonic() + 120
    while not all(part.exists() and b"\n" in part.read_bytes() for part in parts):  # each answers a share
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    for child in children:
        child.suspend()
    refused = subprocess.run([sys.executable, *two], capture_output=True, text=True, **running)
    assert refused.returncode == 1 and "another process is evaluating there" in refused.stderr
    for child in children:
        child.kill()
    assert process.wait() != 0
    assert not (tmp_path / "two" / "metrics.json").exists()
    subprocess.run(accelerate, check=True, capture_output=True, **running)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    for name in ("predictions.jsonl", "metrics.json", "scores.jsonl", "report.html"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


@pytest.mark.slow
def test_the_shipped_model_gives_real_images_the_same_answers_in_any_batch(tmp_path: Path) -> None:
    from medsight.checkpoint import shipped_checkpoint

    data = shared_folder("data", "segmentation")
    cases, _ = read_cases(load_benchmark("segmentation"), data)
    checkpoint = load_for_evaluation(shipped_checkpoint(), SETTINGS, "cpu")
    chosen = cases[::19]
    alone = answered(chosen, checkpoint, tmp_path / "1", 1)
    assert answered(chosen, checkpoint, tmp_path / "8", 8) == alone
    assert any(json.loads(line)["masks"] for line in alone.splitlines())
