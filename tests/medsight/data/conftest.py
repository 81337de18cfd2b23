"""Small data sets, drawn here, in the layouts that the readers know."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from medsight.data.sources import Source, load_source


ASKED = {"from": "human", "value": "What is shown?"}
ANSWERED = {"from": "gpt", "value": "A scan."}


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows that a test reads are not left in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def draw(path: Path, size: tuple[int, int] = (16, 12), inside: bool = False) -> Path:
    """An image, or a mask with some pixels inside, of that (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size[::-1], dtype=bool if inside else np.uint8)
    pixels[2:7, 3:9] = True if inside else 200
    if not inside:  # no two images are the same picture
        pixels[-1, :4] = list(zlib.crc32(path.name.encode()).to_bytes(4, "big"))
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def draw_picture() -> Callable[..., Path]:
    return draw


@pytest.fixture(scope="session")
def write_json() -> Callable[[Path, Any], Path]:
    """Writes a list as a JSON array, or a line an item where the name ends in .jsonl."""

    def write(path: Path, items: list[dict[str, Any]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "\n".join(map(json.dumps, items)) if path.suffix == ".jsonl" else json.dumps(items, indent=1)
        path.write_text(lines, encoding="utf-8")
        return path

    return write


@pytest.fixture
def named_sets(tmp_path: Path) -> Path:
    """Two sets without a manifest: all that is known stands in the file names."""
    root = tmp_path / "named"
    for number in range(6):
        stem = f"case_{number}_CT_abdomen"
        split = "test" if number == 5 else "train"
        draw(root / "amos" / split / f"{stem}.png")
        draw(root / "amos" / f"{split}_mask" / f"{stem}_liver.png", inside=True)
        draw(root / "amos" / f"{split}_mask" / f"{stem}_left+kidney.png", inside=True)
    draw(root / "hc" / "train" / "7_ultrasound_fetal+head.png")
    draw(root / "hc" / "train_mask" / "7_ultrasound_fetal+head_fetal+head.png", inside=True)
    return root


@pytest.fixture
def manifest_sets(tmp_path: Path, write_json: Callable[..., Path]) -> Path:
    """Two sets with a manifest: of six patients with a tumour or none, and of two volumes of six slices."""
    root, rows = tmp_path / "listed", []
    for number in range(6):
        split = "test" if number == 5 else "train"
        image = draw(root / "busi" / split / f"{number}_ultrasound_breast.png").relative_to(root).as_posix()
        common = {"image": image, "modality": "ultrasound", "site": "breast", "split": split, "label_origin": "expert"}
        row = {**common, "target": "breast tumor", "group": f"busi:{number}", "finding": "benign"}
        if number == 0:
            rows.append({**row, "mask": None, "absent": True, "finding": "normal"})
            continue
        mask = draw(root / "busi" / f"{split}_mask" / f"{number}_ultrasound_breast_breast+tumor.png", inside=True)
        rows.append({**row, "mask": mask.relative_to(root).as_posix()})
    for volume in "ab":
        for number in range(6):
            image = draw(root / "torso" / "train" / f"{volume}{number}_CT_torso.png").relative_to(root).as_posix()
            common = {"image": image, "modality": "CT", "site": "torso", "split": "train", "label_origin": "model"}
            for target in ("liver", "spleen"):
                mask = draw(root / "torso" / "train_mask" / f"{volume}{number}_CT_torso_{target}.png", inside=True)
                path = mask.relative_to(root).as_posix()
                rows.append({**common, "mask": path, "target": target, "group": f"torso:{volume}"})
    # Rows of one image need not be neighbours.
    write_json(root / "manifest.jsonl", rows[::2] + rows[1::2])
    return root


@pytest.fixture
def grounded_file(tmp_path: Path, write_json: Callable[..., Path]) -> Path:
    """Two conversations: one cites three codes of two masks' structures, one none."""
    root = tmp_path / "grounded"
    draw(root / "images" / "scan.png")
    for name in ("liver", "spleen"):
        draw(root / "masks" / f"{name}.png", inside=True)
    said = "Segmentations: spleen [M0_7], liver [M0_16], and more liver [C0_16]."
    turns = [{"from": "human", "value": "<image>\nSegment all."}, {"from": "gpt", "value": said}]
    plain = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A scan."}]
    items = [
        {
            "id": 11,
            "image": "images/scan.png",
            "conversations": turns,
            "mask_files": {"0": "masks/liver.png", "1": "masks/spleen.png"},
            "mask_orders": [1, 0, 0],
        },
        {"id": 12, "image": "images/scan.png", "conversations": plain},
    ]
    return write_json(root / "answers.json", items)


@pytest.fixture
def read_items(tmp_path: Path, write_json: Callable[..., Path]) -> Callable[..., datasets.Dataset]:
    """Writes items to a file and reads them back as rows."""

    def read(items: list[dict], name: str = "items.json", **settings) -> datasets.Dataset:
        path = write_json(tmp_path / name, items)
        return load_source(Source("llava", str(path), **settings))

    return read


@pytest.fixture
def conversations(read_items: Callable[..., datasets.Dataset]) -> Callable[[list[dict]], datasets.Dataset]:
    """One about each of the items, which name an image, and perhaps a data set and a patient; `id` is the position."""
    return lambda items: read_items(
        [{"id": str(number), "conversations": [ASKED, ANSWERED], **item} for number, item in enumerate(items)]
    )
