"""A small data set, drawn here: written in BiomedParse's layout, compared with a copy in another one, and damaged."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from medsight.data.pictures import read_mask, read_picture
from medsight.data.registry import Source
from medsight.data.sources import iterate


ORIGIN = {"modality": "CT", "site": "abdomen"}
NAMES = {1: "liver", 2: "left kidney", 3: "liver tumor"}
SIZE = (24, 18)  # width, height


class Example(NamedTuple):
    """An image: its name, patient and split, its pixels, and a label map of `NAMES`."""

    stem: str
    patient: str
    split: str
    pixels: np.ndarray
    labels: np.ndarray

    def masks(self) -> Iterator[tuple[str, np.ndarray]]:
        for value, name in NAMES.items():
            if (self.labels == value).any():
                yield name, self.labels == value


def examples() -> list[Example]:
    """Seven images of four patients in two splits: of no structure, one, two or three."""
    found = []
    for number in range(7):
        chance = np.random.default_rng(number)
        labels = np.zeros(SIZE[::-1], np.uint8)
        for value in range(1, number % 4 + 1):
            top, left = 5 * value - 4, int(chance.integers(0, 8))
            labels[top : top + 4, left : left + 5 + value] = value
            labels[top, left] = 0  # no mere box
        pixels = chance.integers(0, 255, SIZE[::-1], dtype=np.uint8)
        split, patient = ("test", "p3") if number == 6 else ("train", f"p{number // 2}")
        found.append(Example(f"{patient}_{number:02d}", patient, split, pixels, labels))
    return found


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_biomedparse(root: Path) -> Source:
    """All examples with a manifest, which names an image without a structure by one that is absent."""
    records = []
    for each in examples():
        image = save(root / each.split / f"{each.stem}.png", each.pixels)
        common = {"image": image.relative_to(root).as_posix(), **ORIGIN, "split": each.split, "group": each.patient}
        for name, mask in each.masks():
            path = save(root / f"{each.split}_mask" / f"{each.stem}_{name}.png", mask)
            records.append({**common, "mask": path.relative_to(root).as_posix(), "target": name})
        if not each.labels.any():
            records.append({**common, "mask": None, "target": "nothing", "absent": True})
    (root / "manifest.jsonl").write_text("\n".join(map(json.dumps, records)))
    return Source("biomedparse", str(root), split=None)


def contents(source: Source, told: tuple[str, ...] = ("split", "patient")) -> dict[str, Any]:
    """By the name of each image its pixels, masks by structure, and origin: what any layout must agree on."""
    found: dict[str, Any] = {}
    for entry in iterate(source):
        row = entry.checked()
        picture = read_picture(row["image"])
        masks = [
            (target, read_mask(entry, picture.size).tolist())
            for target, entry in zip(row["targets"], row["masks"], strict=True)
        ]
        origin = [row[name] for name in ("modality", "site", *told)]
        stem = next(each.stem for each in examples() if np.array_equal(np.asarray(picture), each.pixels))
        assert stem not in found
        assert len({mask["path"] for mask in row["masks"]}) == len(masks)
        found[stem] = (picture.size, sorted(masks), origin)
    return found


def errors(source: Source) -> list[str]:
    return [str(entry.error) for entry in iterate(source) if entry.error]


JUNK = [None, -1, 10**12, 1.5, "x", "../x", "", [], {}, [None], True, "\0"]


def damaged(content: bytes, chance: random.Random) -> bytes:
    """A file cut short, emptied, with bytes flipped; or a JSON one with a field removed or replaced by junk."""
    way = chance.randrange(5)
    if way > 2:
        try:
            return json.dumps(_spoilt(json.loads(content), chance)).encode()
        except ValueError:
            way = 2
    if way == 0:
        return content[: chance.randrange(len(content) + 1)]
    changed = bytearray(content)
    for _ in range(chance.choice([1, 3, 20]) if way else 0):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def _spoilt(value: Any, chance: random.Random) -> Any:
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or chance.random() < 0.1:
        return chance.choice(JUNK)
    key = chance.choice(keys)
    if chance.random() < 0.3:
        del value[key]
    else:
        value[key] = _spoilt(value[key], chance)
    return value


def fuzz(make: Callable[[], Source], files: list[Path], rounds: int = 100) -> set[str]:
    """Damages one of the files after the other; every outcome is rows, or errors that name the data.

    Returns:
        What came out: "rows", "errors".
    """
    chance, outcomes = random.Random(0), set[str]()
    path = Path(make().path)
    root = path if path.is_dir() else path.parent
    originals = {file: file.read_bytes() for file in files}
    for number in range(rounds):
        file = files[number % len(files)]
        file.write_bytes(damaged(originals[file], chance))
        try:
            source = make()
            entries = list(iterate(source))
        except (ValueError, OSError) as error:
            assert root.name in str(error), repr(error)
            outcomes.add("errors")
        else:
            for entry in entries:
                assert entry.row is not None or root.name in str(entry.error), repr(entry.error)
                outcomes.add("rows" if entry.row is not None else "errors")
        file.write_bytes(originals[file])
    return outcomes
