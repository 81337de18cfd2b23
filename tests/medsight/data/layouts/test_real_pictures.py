"""Real images with masks: the same masks from a COCO file, a table and folders as from BiomedParse's layout."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.mask import encode

from medsight.data.pictures import picture_size, read_mask
from medsight.data.registry import Source
from medsight.data.sources import iterate
from medsight.export.outlines import outlines


IMAGES = 12  # of each set


def rows_of(source: Source) -> Iterator[dict[str, Any]]:
    for entry in iterate(source):
        yield entry.checked()


def masks_of(rows: Iterator[dict[str, Any]]) -> dict[str, list[tuple[str, bytes]]]:
    found = {}
    for row in rows:
        size = picture_size(row["image"])
        masks = zip(row["targets"], row["masks"], strict=True)
        shown = sorted((target, np.packbits(read_mask(entry, size)).tobytes()) for target, entry in masks)
        found[Path(row["image"]["path"]).name] = shown
    return found


@pytest.mark.parametrize("name", ["busi", "totalsegmentator", "dsb2018"])
def test_masks_are_the_same_from_any_layout(shared_data: Path, tmp_path: Path, name: str) -> None:
    root = shared_data / "segmentation"
    rows = list(rows_of(Source("biomedparse", str(root / name), limit=IMAGES)))
    expected = masks_of(iter(rows))
    assert sum(map(len, expected.values())) >= IMAGES
    origin = {"modality": rows[0]["modality"], "site": rows[0]["site"], "split": None}

    names = sorted({target for row in rows for target in row["targets"]})
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": number, "name": target} for number, target in enumerate(names)]
    table = []
    for folder in ("images", "masks"):
        (tmp_path / "pairs" / folder).mkdir(parents=True)
    for number, row in enumerate(rows):
        image, (width, height) = Path(row["image"]["path"]), picture_size(row["image"])
        file = image.relative_to(root).as_posix()
        content["images"].append({"id": number, "file_name": file, "width": width, "height": height})
        shutil.copy(image, tmp_path / "pairs/images")
        for target, entry in zip(row["targets"], row["masks"], strict=True):
            mask = read_mask(entry, (width, height))
            if len(content["annotations"]) % 2:
                form: Any = [part.ravel().tolist() for part in outlines(mask)]
            else:
                found = encode(np.asfortranarray(mask, dtype=np.uint8))
                form = {"size": found["size"], "counts": found["counts"].decode()}
            known = {"id": len(content["annotations"]), "image_id": number, "category_id": names.index(target)}
            content["annotations"].append({**known, "segmentation": form})
            table.append({"image": file, "mask": Path(entry["path"]).relative_to(root).as_posix(), "target": target})
            shutil.copy(entry["path"], tmp_path / "pairs/masks" / f"{image.stem}_{target}_{known['id']}.png")
    (tmp_path / "set.json").write_text(json.dumps(content))
    with (tmp_path / "set.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        writer.writeheader()
        writer.writerows(table)

    for layout, path in (("coco", "set.json"), ("table", "set.csv"), ("pairs", "pairs")):
        images = None if layout == "pairs" else str(root)
        source = Source(layout, str(tmp_path / path), images=images, **origin)
        assert masks_of(rows_of(source)) == expected, layout
