"""What the layouts of nnU-Net and of the Decathlon share: a `dataset.json` in the folder of each data set."""

from collections.abc import Mapping, Set
from glob import glob
from pathlib import Path
from typing import Any

from .records import json_object


ABOUT = "dataset.json"


def about_files(path: str | Path) -> list[Path]:
    """The dataset.json at a path: that file, or of a folder, of the folders in it, or of those that match a pattern.

    Raises:
        FileNotFoundError: there is none.
    """
    if found := _abouts(Path(path)):
        return found
    raise FileNotFoundError(f"{path}: no {ABOUT} in it, or in a folder in it")


def _abouts(path: Path) -> list[Path]:
    folders = [path] if path.exists() else sorted(map(Path, glob(str(path))))
    if path.is_dir() and not (path / ABOUT).exists():
        folders = sorted(path.iterdir())
    files = (folder / ABOUT if folder.is_dir() else folder for folder in folders)
    return [file for file in files if file.name == ABOUT and file.is_file()]


def about_above(file: Path) -> Path:
    """The dataset.json of the data set that a file is in."""
    return next(folder / ABOUT for folder in file.parents if (folder / ABOUT).is_file())


def read_about(file: Path) -> dict[str, Any]:
    """What a dataset.json says.

    Raises:
        ValueError: it is no JSON object.
    """
    _, record = json_object(str(file), file.read_bytes())
    if isinstance(record, ValueError):
        raise record
    return record


def channels_of(record: Mapping[str, Any], field: str, file: Path) -> list[str]:
    """The names of the channels, which a field has by their numbers.

    Raises:
        ValueError: it does not name them so, from "0" without a gap.
    """
    names = record.get(field)
    numbers = [str(number) for number in range(len(names))] if isinstance(names, Mapping) else []
    if not isinstance(names, Mapping) or not names or {*names} != {*numbers}:
        raise ValueError(f"{file}: expected {field} as {{'0': NAME, '1': NAME}}, got {names!r}")
    return [str(names[number]) for number in numbers]


def says(path: Path, record: Mapping[str, Any], fields: Set[str]) -> bool:
    """Whether a record, or the first dataset.json of a folder, has these fields."""
    if path.is_file():
        return fields <= record.keys()
    texts = (json_object(str(file), file.read_bytes())[1] for file in _abouts(path)[:1])
    return any(not isinstance(text, ValueError) and fields <= text.keys() for text in texts)
