"""What label pictures, polygons and run lengths show, as masks of one structure each."""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from medsight.text import first_few, nearest

from .pictures import (
    EmptyMaskError,
    MaskValuesError,
    decode_mask,
    encode_mask,
    picture_name,
    picture_size,
    stored_samples,
)
from .records import UntoldError, check_regions, told_by_source
from .registry import Source
from .schema import region_row
from .templates import read_yaml


# Names of what is no structure: pixels that show nothing, or that nobody labelled.
BACKGROUND = frozenset(["background", "_background_", "bg", "ignore", "ignored", "unlabelled", "unlabeled", "void"])
Value = int | tuple[int, int, int]  # of a pixel: a number, or a colour
_COLOUR = re.compile(r"#([0-9a-fA-F]{6})")
_TRIPLE = re.compile(r"(\d{1,3})[ ,;]+(\d{1,3})[ ,;]+(\d{1,3})")
_LINE = re.compile(r"(#[0-9a-fA-F]{6}|\d+[ ,;]+\d+[ ,;]+\d+|\d+)\s*[:=,;\s]\s*(\S.*)")
_SCALE = 3  # of polygons when they are drawn: a pixel is inside if the middle one of its nine parts is
_MOST_COLOURS = 8  # that an error lists


@dataclasses.dataclass(frozen=True)
class LabelOptions:
    """What the pictures of a source's labels mean, where their files do not say it.

    Attributes:
        structure: what every mask of two values shows.
        names: of label maps, {value: structure}, with numbers or colours ("#ff0000", "255, 0, 0") as values, or the
            other way round; or the path of a file (YAML, JSON, or lines of a value and a name), relative to the data.

    Raises:
        ValueError: both are given, or one is of another kind.

    Example:
        >>> label_names(LabelOptions(names={1: "liver", "#ff0000": "spleen"}).names, Path())
        {1: 'liver', (255, 0, 0): 'spleen'}
    """

    structure: str | None = None
    names: Mapping[Any, Any] | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.structure, str | None) or self.structure == "":
            raise ValueError(f"data structure: expected text, got {self.structure!r}")
        if not isinstance(self.names, Mapping | str | None):
            raise ValueError(f"data names: expected {{value: structure}} or a file of them, got {self.names!r}")
        if isinstance(self.names, Mapping):
            label_names(self.names, Path())
        if self.structure is not None and self.names is not None:
            raise ValueError("data structure and names: a mask shows one structure, or a label map several: give one")


def check_columns(columns: Any, known: Iterable[str]) -> None:
    """Raises ValueError where a setting `columns` is not {column: what the data call it}, of known columns."""
    if columns is not None and not (
        isinstance(columns, Mapping) and all(isinstance(name, str) and name for name in columns.values())
    ):
        raise ValueError(f"data columns: expected {{column: what the data call it}}, got {columns!r}")
    for name in set(columns or ()) - set(known):
        raise ValueError(f"data columns: {name!r} is unknown: {nearest(name, known)}")


def label_names(names: Mapping[Any, Any] | str | None, folder: Path) -> dict[Value, str]:
    """The names of the values of label maps; empty where there are none.

    Args:
        names: as in `LabelOptions`.
        folder: that the path of a file is relative to.

    Raises:
        OSError: the file cannot be read.
        ValueError: there are no names in it, or one is neither text nor beside a value.
    """
    if names is None:
        return {}
    place = "data names"
    if isinstance(names, str):
        place = str(folder / names)
        names = read_label_names(folder / names)
    if not names:
        raise ValueError(f"{place}: expected {{value: structure}}, got nothing")
    found: dict[Value, str] = {}
    for key, name in names.items():
        value = _value_of(key)
        if value is None:
            value, name = _value_of(name), key
        if value is None or not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"{place}: expected a value (1, '#ff0000') and the name of a structure, got {key!r}: {name!r}"
            )
        if found.setdefault(value, name.strip()) != name.strip():
            raise ValueError(f"{place}: the value {key!r} is named {found[value]!r} and {name!r}")
    return found


def _value_of(key: Any) -> Value | None:
    """The value of a pixel that a key stands for; None where it is no value."""
    if isinstance(key, (list, tuple)):
        key = ",".join(map(str, key))
    if isinstance(key, int) and not isinstance(key, bool):
        return key if key >= 0 else None
    if not isinstance(key, str):
        return None
    if match := _COLOUR.fullmatch(key.strip()):
        red, green, blue = bytes.fromhex(match[1])
        return red, green, blue
    if match := _TRIPLE.fullmatch(key.strip("() ")):
        red, green, blue = map(int, match.groups())
        return red, green, blue
    return int(key) if key.strip().isascii() and key.strip().isdigit() and len(key) < 12 else None


def read_label_names(path: str | Path) -> dict[Any, Any]:
    """The names in a file: YAML or JSON of {value: name} or {name: value}, or lines of a value and a name.

    A list without values counts from 0 and begins with the background, so that nothing has to be guessed.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither, or not UTF-8.
    """
    path = Path(path)
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        content = read_yaml(path)
        content = content.get("names", content) if isinstance(content, dict) else content
    else:
        try:
            content = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected UTF-8 text ({error})") from error
        matches = [_LINE.fullmatch(line) for line in content]
        if content and all(matches):
            return {match[1]: match[2] for match in matches if match}
    if isinstance(content, list) and content and str(content[0]).lower() in BACKGROUND:
        return dict(enumerate(content))
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a value and a name in each line, {{value: name}}, or a list that begins with "
            "'background', which is 0"
        )
    return content


def names_in_file(path: str | Path) -> dict[int | str, str]:
    """The names in a file as an entry holds them: by number, or by colour as "#ff0000"; raises as `label_names`."""
    names = label_names(os.path.abspath(path), Path())
    return {value if isinstance(value, int) else "#" + bytes(value).hex(): name for value, name in names.items()}


def masks_of(
    entry: Mapping[str, Any], structure: str | None, names: Mapping[Value, str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The masks that a picture of labels shows, and their structures; none where it is empty.

    Args:
        entry: the picture, as rows hold it. A mask of two values stays what it is.
        structure: what a mask of two values shows.
        names: of a label map's values; where there are any, the picture is one.

    Raises:
        OSError, ValueError: it cannot be read, or has values without a name.
        UntoldError: it needs names, or a structure.
    """
    if names:
        return _of_label_map(entry, names)
    try:
        decode_mask(entry, picture_size(entry))
    except EmptyMaskError:
        return [], []
    except MaskValuesError as error:
        raise UntoldError(f"{error}; or say what its values are: names: {{1: NAME, ...}}", "names") from error
    if structure is None:
        raise UntoldError(f"{picture_name(entry)}: what the mask shows is not told: say structure: NAME", "structure")
    return [dict(entry)], [structure]


def _of_label_map(entry: Mapping[str, Any], names: Mapping[Value, str]) -> tuple[list[dict[str, Any]], list[str]]:
    name = picture_name(entry)
    samples = stored_samples(entry, name, indices=any(isinstance(value, int) for value in names))
    if samples.ndim == 2 and any(isinstance(value, tuple) for value in names):
        samples = np.repeat(samples[:, :, None], 3, axis=2)
    if samples.max(initial=0) >= (1 << 20 if samples.ndim == 3 else 1 << 40) or samples.min(initial=0) < 0:
        raise ValueError(f"{name}: expected a label map, of small whole numbers or colours")
    labels = samples.astype(np.int64)
    if (labels != samples).any():
        raise ValueError(f"{name}: expected a label map of whole numbers, got fractions")
    if labels.ndim == 3:
        labels = labels @ np.array([1 << 40, 1 << 20, 1])
    coded = {_code(value): structure for value, structure in names.items()}
    found = np.unique(labels).tolist()
    unknown = [_shown(code, samples.ndim) for code in found if code and code not in coded]
    if unknown:
        raise UntoldError(
            f"{name}: {len(unknown)} value(s) without a name: {first_few(unknown, _MOST_COLOURS)}. Name each in "
            "names, and what is no structure 'ignore'",
            "names",
        )
    present = {
        structure: None for code in found if (structure := coded.get(code)) and structure.lower() not in BACKGROUND
    }
    codes = {structure: [code for code in found if coded.get(code) == structure] for structure in present}
    masks = [encode_mask(np.isin(labels, codes[structure]), f"{name}, {structure}") for structure in present]
    return masks, list(present)


def _code(value: Value) -> int:
    return value if isinstance(value, int) else value[0] << 40 | value[1] << 20 | value[2]


def _shown(code: int, axes: int) -> str:
    return str(code) if axes == 2 else "#" + "".join(f"{code >> shift & 0xFFFFF:02x}" for shift in (40, 20, 0))


def polygon_mask(polygons: Iterable[Sequence[float]], size: tuple[int, int], place: str) -> np.ndarray:
    """(height, width), bool: the pixels whose centres lie in one of some polygons, to a third of a pixel.

    Args:
        polygons: x, y, x, y, ... of each in pixels; (0, 0) is the outer corner of the first pixel.
        size: (width, height) of the picture.

    Raises:
        ValueError: a polygon has fewer than three points, or one that is no number or far outside.
    """
    width, height = size
    mask = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        try:
            points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{place}: expected a polygon x, y, x, y, ..., got {str(polygon)[:60]}") from error
        if len(points) < 3:
            raise ValueError(f"{place}: expected a polygon of at least 3 points, got {len(points)}: a box is no mask")
        if not (
            np.isfinite(points).all() and (np.abs(points - [width / 2, height / 2]) <= [2 * width, 2 * height]).all()
        ):
            raise ValueError(f"{place}: a point of a polygon lies far outside of its image of {width}x{height} pixels")
        left, top = np.floor(points.min(axis=0)).astype(int).clip(0, [width, height])
        right, bottom = np.ceil(points.max(axis=0)).astype(int).clip(0, [width, height])
        if left < right and top < bottom:
            canvas = Image.new("1", (_SCALE * int(right - left), _SCALE * int(bottom - top)))
            corners = (points - [left, top]) * _SCALE - 0.5  # Pillow counts from the middle of a pixel
            ImageDraw.Draw(canvas).polygon(corners.ravel().tolist(), fill=1)
            mask[top:bottom, left:right] |= np.asarray(canvas)[_SCALE // 2 :: _SCALE, _SCALE // 2 :: _SCALE]
    return mask


def rle_mask(counts: Any, size: tuple[int, int], place: str) -> np.ndarray:
    """(height, width), bool, of COCO's run lengths: down the columns, outside first.

    Decoded here: pycocotools reads beyond the end of a damaged text, and leaves what runs do not reach to chance.

    Args:
        counts: the list of run lengths, or COCO's text of them.
        size: (width, height).

    Raises:
        ValueError: they are neither, or not of as many pixels.
    """
    runs = _runs(counts, place) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise ValueError(f"{place}: expected run lengths, numbers of at least 0 or COCO's text of them")
    width, height = size
    if sum(runs) != width * height:
        raise ValueError(f"{place}: run lengths of {sum(runs):,} pixels, for an image of {width}x{height}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _runs(text: str, place: str) -> list[int]:
    """Run lengths from COCO's text: numbers of 5 bits a character, from the lowest, each but the first three less the
    one before the last."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40:
            break
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16 and 1) << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    else:
        if not shift:
            return runs
    raise ValueError(f"{place}: the text of run lengths is damaged or cut short")


def image_row(
    source: Source,
    image: Mapping[str, Any],
    masks: Sequence[dict[str, Any]],
    targets: Sequence[str],
    split: str,
    place: str,
    **known: Any,
) -> dict[str, Any]:
    """A row about one image, with what the source says of all: its modality and site go before those of the layout.

    Args:
        known: further fields of the row; without a patient, the pattern of the source's tells it, or the image is one.

    Raises:
        UntoldError: neither the source nor the layout says the modality, or the site.
        ValueError: masks and targets do not go together, or the pattern of the patient is not in the image's name.
    """
    for name in ("modality", "site"):
        if getattr(source, name) is not None or not known.get(name):
            known[name] = told_by_source(source, name, place)
    dataset = known.pop("dataset", None) or source.name
    patient = known.pop("patient", None) or source.patient_of(image["path"])
    patient = patient or f"{dataset}:{relative_name(image['path'], source)}"
    known = {name: value for name, value in known.items() if value is not None}
    row = region_row(dict(image), list(masks), list(targets), split, **known, dataset=dataset, patient=patient)
    check_regions(row, place)
    return row


def relative_name(path: str, source: Source) -> str:
    """A picture's path as it lies in the data, with slashes; of one elsewhere its last three parts."""
    root = Path(source.path)
    for folder in (source.images, root if root.is_dir() else root.parent):
        if folder and Path(path).is_relative_to(folder):
            return Path(path).relative_to(folder).as_posix()
    return "/".join(part for part in Path(path).parts[-3:] if part != Path(path).anchor)
