"""Small data sets, drawn here, and what tests of the evaluation share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image


SIDE = (20, 16)  # width, height


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a test reads are not left in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def draw(path: Path, mask: bool = False, seed: int = 0) -> Path:
    """A picture, or a mask of a rectangle, of `SIDE` pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    if mask:
        pixels = np.zeros(SIDE[::-1], dtype=bool)
        top, left = generator.integers(0, 8, 2)
        pixels[top : top + 6, left : left + 9] = True
        Image.fromarray(pixels).save(path)
    else:
        Image.fromarray(generator.integers(0, 256, (*SIDE[::-1], 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def draw_picture() -> Callable[..., Path]:
    return draw


@pytest.fixture(scope="session")
def write_lines() -> Callable[[Path, list[Any]], Path]:
    """Writes a JSON object a line."""

    def write(path: Path, records: list[Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def regions(tmp_path_factory: pytest.TempPathFactory, write_lines: Callable[..., Path]) -> Path:
    """Seven test images of two modalities with nine masks, two absent structures, findings; and a training image."""
    root, rows = tmp_path_factory.mktemp("data") / "sets", []
    for number in range(7):
        modality, site, targets = ("CT", "torso", ["liver", "spleen"]) if number < 2 else ("ultrasound", "breast", [])
        targets = targets or (["malignant breast tumor"] if number < 6 else [])
        split = "train" if number == 5 else "test"
        image = draw(root / "set" / split / f"{number}.png", seed=number).relative_to(root).as_posix()
        common = {"image": image, "modality": modality, "site": site, "split": split, "group": f"p{number}"}
        if modality == "ultrasound":
            common["finding"] = "malignant" if targets else "normal"
        else:
            common["voxel_mm"] = [2.0, 2.0, 2.0]
        for target in targets:
            mask = draw(root / "set" / f"{split}_mask" / f"{number}_{target}.png", mask=True, seed=number + len(rows))
            rows.append({**common, "target": target, "mask": mask.relative_to(root).as_posix()})
        if not targets or number == 4:
            rows.append({**common, "target": "cyst" if targets else "breast tumor", "mask": None, "absent": True})
    write_lines(root / "manifest.jsonl", rows)
    return root


@pytest.fixture(scope="session")
def declare(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a benchmark's declaration, the shipped one with some keys changed."""
    import yaml

    from medsight.evaluation.benchmarks import DECLARATIONS

    def write(name: str, **changed: Any) -> Path:
        entry = {**yaml.safe_load(DECLARATIONS.read_text("utf-8"))[name], **changed}
        path = tmp_path_factory.mktemp("declared") / f"{name}.yaml"
        path.write_text(yaml.safe_dump({name: entry}), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def named_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the code groups of `regions`; read only."""
    from configuration_medsight import MedSightConfig
    from tests.tiny_checkpoint import save_tiny_checkpoint

    names = ["CT torso", "ultrasound breast", *(f"group {index}" for index in range(2, 40))]
    number = MedSightConfig.from_preset("tiny").num_groups
    return save_tiny_checkpoint(tmp_path_factory.mktemp("named") / "tiny", group_names=names[:number])


@pytest.fixture
def evaluate(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `medsight evaluate` on the tiny model, or on saved predictions; its status, and what it printed."""
    from medsight import cli

    def run(benchmark: Path, data: Path, output: Path, *options: str) -> tuple[int, str]:
        arguments = ["--benchmark", str(benchmark), "--data", str(data), "--output", str(output), *options]
        if "--predictions" not in options:
            arguments += ["--device", "cpu", "--max-new-tokens", "8"]
            arguments += [] if "--model" in options else ["--model", str(tiny_checkpoint)]
        status = cli.main(["evaluate", *arguments])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run
