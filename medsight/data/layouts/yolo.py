"""Polygons in YOLO's text files: `images/train/a.jpg` and `labels/train/a.txt`, a line `CLASS x y x y ...` a mask.

Coordinates are shares of width and height. The names of the classes stand in a `data.yaml`, in `classes.txt`, or in
the source's `names`. Splits are folders' names, or what `data.yaml` says is `train`, `val` and `test`. An image
without a text file, or with an empty one, has no mask. Boxes are no masks and are refused.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..picture_labels import BACKGROUND, image_row, polygon_mask, relative_name
from ..pictures import encode_mask, picture_size
from ..records import IMAGE_SUFFIXES, Record, as_text, convert, path_inside, picture
from ..registry import Entry, Layout, Source, register
from ..splits import split_in_name
from ..templates import read_yaml


IMAGES, LABELS = "images", "labels"
_NAMES = ("classes.txt", "labels/classes.txt", "obj.names")


@dataclasses.dataclass(frozen=True)
class YoloOptions:
    """Settings of this layout.

    Attributes:
        names: of the classes, from 0, where no data.yaml is there.

    Example:
        >>> YoloOptions(names=["polyp"]).names
        ['polyp']
    """

    names: Sequence[str] | Mapping[int, str] | None = None

    def __post_init__(self) -> None:
        if self.names is not None:
            _classes(self.names, "data names")


def _classes(names: Any, place: str) -> dict[int, str]:
    listed = dict(enumerate(names)) if isinstance(names, list | tuple) else names
    if not isinstance(listed, Mapping) or not listed or not all(type(number) is int for number in listed):
        raise ValueError(f"{place}: expected the names of classes, a list or {{number: name}}, got {names!r}")
    return {number: as_text(name, place, f"names[{number}]") for number, name in listed.items()}


def _settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The YAML file of a data set, and its content; an empty one where there is none."""
    for file in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        content = read_yaml(file)
        if isinstance(content, dict) and "names" in content:
            return file, content
    return folder / "data.yaml", {}


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error})") from error


def _class_names(source: Source, file: Path, settings: Mapping[str, Any]) -> dict[int, str]:
    if source.options.names is not None:
        return _classes(source.options.names, "data names")
    if settings:
        return _classes(settings["names"], str(file))
    for name in _NAMES:
        if (listed := file.parent / name).is_file():
            return _classes([line for line in _text(listed).splitlines() if line.strip()], str(listed))
    raise ValueError(
        f"{file}: no such file, and no {' or '.join(_NAMES)}: say what the classes are (names: [NAME, ...])"
    )


def yolo_rows(shard: str, source: Source) -> Iterator[Entry]:
    """One row an image of the folder, with a mask a line of its text file."""
    root = Path(shard)
    file, settings = _settings(root)
    names, splits = _class_names(source, file, settings), _split_folders(root, settings)

    def records() -> Iterator[Record]:
        for image in _images(root):
            told = next((split for folder, split in splits.items() if image.is_relative_to(folder)), None)
            split = told or split_in_name(image.parent.relative_to(root))
            yield str(image), {"image": relative_name(str(image), source), "split": split, "file": image}
        for text in sorted(root.rglob("*.txt")):
            if (
                LABELS in text.relative_to(root).parts[:-1]
                and text.name != "classes.txt"
                and not _image_of(text, root)
            ):
                yield str(text), ValueError(f"{text}: labels without an image in the folder {IMAGES} beside {LABELS}")

    def row_of(record: dict[str, Any], place: str, split: str) -> dict[str, Any]:
        image, text = picture(record["file"]), _swapped(record["file"], root, IMAGES, LABELS).with_suffix(".txt")
        masks, targets = list[dict[str, Any]](), list[str]()
        for number, structure, mask in _polygons(text, picture_size(image), names) if text.is_file() else ():
            if mask.any() and structure.lower() not in BACKGROUND:
                masks.append(encode_mask(mask, f"{image['path']}, {structure} {number}"))
                targets.append(structure)
        return image_row(source, image, masks, targets, split, place)

    yield from convert(records(), source, None, row_of)


def _split_folders(root: Path, settings: Mapping[str, Any]) -> dict[Path, str]:
    """The folders that a data.yaml says are of a split; of one beside it, exporters write `../train/images`."""
    found: dict[Path, str] = {}
    for split in ("train", "val", "test"):
        entry = settings.get(split) or []
        for name in [entry] if isinstance(entry, str) else entry if isinstance(entry, list) else []:
            inside = path_inside(root, str(name).lstrip("./") or ".", f"{root}, {split}")
            if inside.is_file():
                raise ValueError(f"{inside}: expected the folder of the split {split}, not a list of its images")
            if inside.is_dir() and inside != root:
                found[inside] = "validation" if split == "val" else split
    return found


def _polygons(text: Path, size: tuple[int, int], names: Mapping[int, str]) -> Iterator[tuple[int, str, Any]]:
    """Number, structure and mask of each line."""
    for number, line in enumerate(_text(text).splitlines(), 1):
        place, words = f"{text}, line {number}", line.split()
        if not words:
            continue
        if len(words) == 5:
            raise ValueError(f"{place}: a box (class and 4 numbers), which is no mask: export polygons (segmentation)")
        if not words[0].isdecimal() or int(words[0]) not in names:
            raise ValueError(f"{place}: expected the number of a class, one of {sorted(names)}, got {words[0]!r}")
        try:
            points = np.array(words[1:], dtype=np.float64).reshape(-1, 2) * size
        except ValueError as error:
            raise ValueError(f"{place}: expected CLASS x y x y ..., got {line[:60]!r}") from error
        yield number, names[int(words[0])], polygon_mask([points.ravel().tolist()], size, place)


def _images(root: Path) -> Iterator[Path]:
    for file in sorted(root.rglob("*")):
        if file.suffix.lower() in IMAGE_SUFFIXES and IMAGES in file.relative_to(root).parts[:-1] and file.is_file():
            yield file


def _swapped(file: Path, root: Path, old: str, new: str) -> Path:
    """A path with the last folder of a name replaced by another one."""
    parts = list(file.relative_to(root).parts)
    place = len(parts) - 1 - parts[::-1].index(old)
    return root.joinpath(*parts[:place], new, *parts[place + 1 :])


def _image_of(text: Path, root: Path) -> bool:
    image = _swapped(text, root, LABELS, IMAGES)
    return any(image.with_suffix(suffix).is_file() for each in IMAGE_SUFFIXES for suffix in (each, each.upper()))


def _shards(source: Source) -> list[str]:
    if not Path(source.path).is_dir():
        raise FileNotFoundError(f"{source.path}: no such folder; a folder with {IMAGES}/ and {LABELS}/ in it is read")
    return [source.path]


def _looks_like(path: Path, record: Mapping[str, Any]) -> bool:
    texts = (file for folder in (LABELS, f"*/{LABELS}") for file in path.glob(f"{folder}/**/*.txt"))
    return path.is_dir() and any(_image_of(text, path) for text in texts)


register(Layout("yolo", "regions", _shards, yolo_rows, _looks_like, YoloOptions, embeds=True))
