"""The shipped medsight-nano: small enough, whole, and really able to find something."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsight import Predictor
from medsight.checkpoint import shipped_checkpoint


SHARED = Path(os.environ.get("MEDSIGHT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
SETS = SHARED / "data" / "segmentation"


@pytest.fixture(scope="module")
def nano() -> Predictor:
    return Predictor(device="cpu")


def test_the_folder_is_small_and_carries_its_code() -> None:
    files = list(shipped_checkpoint().rglob("*"))
    assert sum(path.stat().st_size for path in files if path.is_file()) <= 12e6
    names = {path.name for path in files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_medsight.py"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_its_code_is_the_code_of_this_repository(tmp_path: Path) -> None:
    from configuration_medsight.remote_code_medsight import write_remote_code

    write_remote_code(tmp_path)
    for fresh in sorted(tmp_path.iterdir()):
        shipped = shipped_checkpoint() / fresh.name
        assert shipped.read_text("utf-8") == fresh.read_text("utf-8"), f"{fresh.name}: save the shipped folder again"


def test_it_has_at_most_six_million_parameters_and_a_default_of_masks(nano: Predictor) -> None:
    assert nano.model.num_parameters() <= 6_000_000
    assert nano.model.generation_config.return_dict_in_generate


@pytest.mark.skipif(not SETS.is_dir(), reason=f"no shared data at {SETS}")
def test_it_outlines_fetal_heads_of_patients_it_never_saw(nano: Predictor) -> None:
    rows = [json.loads(line) for line in (SETS / "manifest.jsonl").read_text("utf-8").splitlines()]
    rows = [row for row in rows if row["image"].startswith("hc18/test/")][:6]
    scores = []
    for row in rows:
        answer = nano(SETS / row["image"], "Segment the fetal head.").answer
        reference = np.asarray(Image.open(SETS / row["mask"]).convert("L")) > 0
        mask = answer.regions[0].mask.numpy() if answer.regions else np.zeros_like(reference)
        scores.append(2 * (mask & reference).sum() / (mask.sum() + reference.sum()))
    assert np.mean(scores) > 0.7, scores
