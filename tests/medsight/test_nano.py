"""The shipped medsight-nano: small enough, whole, and giving the answers that the README prints."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsight import Predictor
from medsight.checkpoint import shipped_checkpoint
from tests.shared import SHARED


SETS = SHARED / "data" / "segmentation"
README = Path(__file__).resolve().parents[2] / "README.md"
SHA256 = "43ac25408c969ffb3850b6bb032c193cf2c91ad04866c693d7e5c027a3de2a80"


@pytest.fixture(scope="module")
def nano() -> Predictor:
    return Predictor(device="cpu")


def test_the_folder_is_small_and_free_of_pickles() -> None:
    files = list(shipped_checkpoint().iterdir())
    assert all(path.is_file() for path in files) and sum(path.stat().st_size for path in files) <= 12e6
    names = {path.name for path in files}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_its_weights_are_the_ones_that_were_measured() -> None:
    weights = shipped_checkpoint() / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == SHA256


def test_it_has_at_most_six_million_parameters_and_a_default_of_masks(nano: Predictor) -> None:
    assert nano.model.num_parameters() <= 6_000_000
    assert nano.model.generation_config.return_dict_in_generate


@pytest.mark.skipif(not SETS.is_dir(), reason=f"no shared data at {SETS}")
def test_it_gives_the_answers_that_the_readme_prints(nano: Predictor) -> None:
    rows = [json.loads(line) for line in (SETS / "manifest.jsonl").read_text("utf-8").splitlines()]
    masks = {(row["image"], row["target"]): row["mask"] for row in rows}
    printed = re.findall(
        r"^\| (\w+) \| `(.+?)` \| (Segment the (.+)\.) \| (.+?) \| (\d\.\d\d) \|$", README.read_text(), re.M
    )
    assert len(printed) == 10
    for dataset, file, prompt, target, text, dice in printed:
        image = f"{dataset}/test/{file}"
        answer = nano(SETS / image, prompt).answer
        assert answer.raw_text == text, image
        reference = np.asarray(Image.open(SETS / masks[image, target]).convert("L")) > 0
        found = np.any([np.zeros_like(reference), *(region.mask.numpy() for region in answer.regions)], axis=0)
        score = 2 * (found & reference).sum() / (found.sum() + reference.sum())
        assert score == pytest.approx(float(dice), abs=0.011), image
