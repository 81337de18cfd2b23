"""Small volumes in the layouts that are read, the same rows in BiomedParse's, and files damaged in many ways."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medsight.data.layouts.biomedparse import MANIFEST
from medsight.data.pictures import read_mask, read_picture
from medsight.data.sources import Source, iterate
from medsight.scans import open_scan


SHAPE = (8, 7, 6)  # i, j, k
SPACING = (1.5, 1.5, 4.0)  # mm
NAMES = {1: "liver", 2: "spleen"}
SLOWEST = 5  # seconds that a damaged file may take


def affine_of(spacing: tuple[float, float, float] = SPACING, axes: str = "RAS") -> np.ndarray:
    """Of voxels whose axes point to these sides."""
    matrix = np.eye(4)
    for column, (side, size) in enumerate(zip(axes, spacing, strict=True)):
        row = "RLAPSI".index(side) // 2
        matrix[:3, column] = 0
        matrix[row, column] = size if side in "RAS" else -size
    matrix[:3, 3] = (-12, 30, 5)
    return matrix


def image_voxels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 900, SHAPE).astype(np.int16)


def label_voxels(seed: int) -> np.ndarray:
    """Two structures in the upper four of six slices; of the second a single voxel in the last of them."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[1 : 4 + seed, 1:4, 2:5] = 1
    labels[5:, 4:6, 3:5] = 2
    labels[7, 0, 5] = 2
    return labels


def save_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine_of() if affine is None else affine), path)
    return path


def save_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def write_biomedparse(root: Path, cases: list[dict[str, Any]]) -> Source:
    """Axial slices of cases (name, image, labels, and `common` fields of their rows) as pictures with a manifest.

    What a slice shows is told here by the axes of the array, which are right, anterior and superior.
    """
    records = []
    for case in cases:
        scan = open_scan(case["image"])
        for k in range(SHAPE[2]):
            shown = case["labels"][::-1, ::-1, k].T
            if not shown.any():
                continue
            image = root / "images" / f"{case['name']}_{k}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            scan.slice_image(k).save(image)
            common = {"image": f"images/{image.name}", "orientation": "LP", "group": case["name"], **case["common"]}
            for number, target in NAMES.items():
                if (shown == number).any():
                    name = f"images/{case['name']}_{k}_{target}.png"
                    Image.fromarray(shown == number).save(root / name)
                    records.append({**common, "mask": name, "target": target, "voxel_mm": [1.5, 1.5]})
    (root / MANIFEST).write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return Source("biomedparse", str(root), split=None)


def read(source: Source) -> list[dict[str, Any]]:
    return [entry.checked() for entry in iterate(source)]


def decoded(row: dict[str, Any]) -> dict[str, Any]:
    """A row with pixels in the place of pictures, and without what names files and the data set."""
    picture = read_picture(row["image"])
    masks = [read_mask(mask, picture.size).tolist() for mask in row["masks"]]
    pixels = np.asarray(picture).tolist()
    names = ("targets", "absent", "split", "modality", "site", "patient", "orientation", "spacing_mm")
    return {"image": pixels, "masks": masks, **{name: row[name] for name in names}}


def labels_again(source: Source, path: Path, plane: str, names: dict[int, str]) -> np.ndarray:
    """A label map put together from the masks of a volume's rows, by `Scan.to_source`."""
    scan = open_scan(path, plane=plane)
    found = np.zeros(scan.to_source({}).shape, np.uint8)
    for row in read(source):
        index = int(row["image"]["path"].rpartition(" ")[2])
        for target, mask in zip(row["targets"], row["masks"], strict=True):
            number = next(number for number, name in names.items() if name == target)
            found[scan.to_source({index: read_mask(mask, scan.picture_size)})] = number
    return found


def damaged(root: Path, count: int) -> Iterator[str]:
    """Damages the files of a folder, each whole again before the next, and yields what was done.

    An end is cut off, or all of it, bytes are changed, or a field of JSON is taken out or changed.
    """
    files = sorted(file for file in root.rglob("*") if file.is_file())
    for number in range(count):
        rng = np.random.default_rng(number)
        file = files[number % len(files)]
        whole = file.read_bytes()
        kind = ["cut", "empty", "flip", "field"][int(rng.integers(0, 4 if file.suffix == ".json" else 3))]
        content = bytearray(whole)
        if kind == "cut":
            del content[int(rng.integers(0, len(content))) :]
        elif kind == "empty":
            content.clear()
        elif kind == "flip":
            for at in rng.integers(0, len(content), int(rng.integers(1, 6))):
                content[at] = rng.integers(0, 256)
        else:
            content = bytearray(_without_a_field(json.loads(whole), rng))
        file.write_bytes(content)
        yield f"{file.name}, {kind} {number}"
        file.write_bytes(whole)


def _without_a_field(content: Any, rng: np.random.Generator) -> bytes:
    holders = [content, *(value for value in content.values() if isinstance(value, dict) and value)]
    holder = holders[int(rng.integers(len(holders)))]
    key = [*holder][int(rng.integers(len(holder)))]
    if rng.integers(2):
        del holder[key]
    else:
        holder[key] = [None, "", 7, [], {"x": 1}, "../../etc"][int(rng.integers(6))]
    return json.dumps(content).encode()


def check_fuzz(source: Source, root: Path, count: int) -> None:
    """Every damaged file gives rows, or errors that name it; nothing else, and soon."""
    refused = 0
    copy = root.parent / f"{root.name} damaged"
    shutil.copytree(root, copy)
    place = Source.from_mapping({**source.to_mapping(), "path": str(copy)})
    for what in damaged(copy, count):
        start = time.perf_counter()
        try:
            for entry in iterate(place):
                if entry.error is not None:
                    refused += 1
                    assert isinstance(entry.error, ValueError) and str(copy) in str(entry.error), what
                    assert "Secret" not in str(entry.error), what
                else:
                    decoded(entry.checked())
        except (ValueError, OSError) as error:
            refused += 1
            assert str(copy) in str(error), f"{what}: {error}"
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__} came out") from error
        assert time.perf_counter() - start < SLOWEST, what
    assert refused > count / 4
