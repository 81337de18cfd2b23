"""A converted checkpoint computes what the published modules compute, in a process that does not have this package."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Tokenizer

from medsight.cli import main
from tests.shared import SHARED


PARITY = SHARED / "parity"
COMPUTE = Path(__file__).with_name("compute_parity.py")
ENTRIES = (
    *("patch_features", "region_embeddings", "final_image_features", "seg_logits", "class_logits", "modality_logits"),
    *("code_indices", "code_vectors", "reconstructed_regions"),
    *(f"{name}_{b}" for b in (0, 1) for name in ("text_ids", "logits", "mask_logits")),
)
Results = tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]


def convert_and_compute(files: dict[str, Path], inputs: dict[str, torch.Tensor], meta: Any, place: Path) -> list[Any]:
    """Converts with the command, and computes in a fresh, isolated process: once with each Auto class."""
    arguments = ["convert", "--output", str(place / "model")]
    for name, path in files.items():
        arguments += [f"--{name}", str(path)]
    assert main(arguments) == 0
    save_file(inputs, place / "inputs")
    (place / "inputs.json").write_text(json.dumps(meta), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-I", COMPUTE, place / "model", place / "inputs", place / "results"],
        cwd=place,
        env={**os.environ, "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [load_file(place / f"results.{number}") for number in (0, 1)]


@pytest.fixture(scope="module")
def published_numbers(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the published modules computed, and what we do."""
    if not PARITY.is_dir():
        pytest.skip(f"the published numbers are not here ({PARITY}); MEDSIGHT_SHARED names another place")
    expected = load_file(PARITY / "expected.safetensors")
    files = {
        "llm": PARITY / "llm",
        "region-perceiver": PARITY / "region_perceiver.pt",
        "codebook": PARITY / "codebook.pt",
        "image-encoder": PARITY / "unimed_clip.pt",
    }
    inputs = {name: expected.pop(name) for name in ("pixel_values", "code_groups")}
    meta = json.loads((PARITY / "meta.json").read_text(encoding="utf-8"))
    return expected, convert_and_compute(files, inputs, meta, tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def own_numbers(published: Any, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a model of ours computes, and what it does after a trip through the published file layout."""
    torch.manual_seed(0)
    model, config = published.model, published.model.config
    inputs = {
        "pixel_values": torch.randn(2, 3, config.image_size, config.image_size),
        "code_groups": torch.tensor([2, 0]),
    }
    meta = {
        "image_block_after": "<|im_start|>user\n",
        "texts": [
            "<|im_start|>user\nAll.<|im_end|>\n<|im_start|>assistant\nliver [M0_1], spleen [M2_3].<|im_end|>",
            "<|im_start|>user\nAll.<|im_end|>\n<|im_start|>assistant\nlesion [M1_2]",
        ],
    }
    module = runpy.run_path(str(COMPUTE), init_globals={"torch": torch})
    tokenizer = Qwen2Tokenizer.from_pretrained(published.llm)
    with torch.no_grad():
        expected = module["compute"](model, tokenizer, **inputs, meta=meta)
    paths = {name.replace("_", "-"): path for name, path in published.loose().items()}
    place = tmp_path_factory.mktemp("own")
    return expected, convert_and_compute({"llm": published.llm, **paths}, inputs, meta, place)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("numbers", ["published_numbers", "own_numbers"])
def test_a_converted_checkpoint_computes_the_same_numbers(
    numbers: str, entry: str, request: pytest.FixtureRequest
) -> None:
    """To 1e-4 of the reference's largest absolute value; ids and indices exactly."""
    expected, computed = request.getfixturevalue(numbers)
    assert set(expected) == set(ENTRIES)
    for actual in computed:
        assert actual[entry].shape == expected[entry].shape
        difference = (actual[entry].double() - expected[entry].double()).abs().max()
        allowed = 1e-4 * expected[entry].double().abs().max() if expected[entry].is_floating_point() else 0
        assert difference <= allowed, f"{entry}: off by {difference:.2e}, {allowed:.2e} are allowed"
