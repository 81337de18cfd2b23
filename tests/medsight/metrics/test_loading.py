"""Each metric loads from its folder alone, without a network, and says what it needs."""

import ast
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import medsight.metrics
from medsight.metrics import METRICS, load
from medsight.metrics.mask_dice.mask_counts import score_item


ROOT = Path(medsight.metrics.__file__).parent
MASK = np.eye(3, dtype=bool)
CALLS: dict[str, dict[str, Any]] = {
    "medical_vqa": {"predictions": ["yes"], "references": ["yes"], "answer_types": ["CLOSED"]},
    "mask_dice": {"items": [score_item([MASK], [MASK])]},
    "region_codes": {"predictions": [["[C0_1]"]]},
}


@pytest.mark.parametrize("name", METRICS)
def test_a_copy_of_the_folder_loads_by_path_offline(name: str, tmp_path: Path) -> None:
    import evaluate

    folder = shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert evaluate.load(str(folder), keep_in_memory=True).compute(**CALLS[name])


@pytest.mark.parametrize("name", METRICS)
def test_requirements_name_every_package_that_the_folder_imports(name: str) -> None:
    imported = set()
    for path in (ROOT / name).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).partition(".")[0])
    required = set(re.findall(r"^[a-z]+", (ROOT / name / "requirements.txt").read_text("utf-8"), re.MULTILINE))
    assert imported - set(sys.stdlib_module_names) <= required


@pytest.mark.parametrize("name", METRICS)
def test_the_card_says_what_the_hub_asks_for(name: str) -> None:
    _, front, body = (ROOT / name / "README.md").read_text("utf-8").split("---\n", 2)
    assert {"evaluate", "metric"} <= set(yaml.safe_load(front)["tags"])
    assert f"# Metric card: {name}" in body and "## Sources" in body


@pytest.mark.parametrize("name", METRICS)
def test_batches_give_what_one_call_gives(name: str) -> None:
    metric, twice = load(name), {key: value * 2 for key, value in CALLS[name].items()}
    metric.add_batch(**CALLS[name])
    metric.add_batch(**CALLS[name])
    assert metric.compute() == load(name).compute(**twice)


@pytest.mark.parametrize("name", METRICS)
def test_a_refused_batch_leaves_the_metric_usable(name: str) -> None:
    metric = load(name)
    with pytest.raises(ValueError):
        metric.compute(**{key: [3] for key in CALLS[name]})
    assert metric.compute(**CALLS[name]) == load(name).compute(**CALLS[name])


@pytest.mark.parametrize("name", METRICS)
def test_nothing_to_score_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no "):
        load(name).compute()
    with pytest.raises(ValueError, match="no "):
        load(name).compute(**{key: [] for key in CALLS[name]})


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of medical_vqa, mask_dice, region_codes"):
        load("accuracy")
