"""The folder of an answer: written whole or not at all, recognised when finished, never mixed with other files."""

import copy
import dataclasses
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsight.files import staged_folder


if TYPE_CHECKING:
    from medsight.inference.prediction import Prediction

ANSWER_FILE = "answer.json"
OVERLAY_FILE = "overlay.png"
LONGEST_NAME = 60  # characters: of any script, below what file systems take
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", flags=re.IGNORECASE)  # by Windows
SUFFIXES = re.compile(r"(\.nii)?\.[A-Za-z0-9]{1,5}$")


def save_answer(
    predictions: "Sequence[Prediction]",
    folder: Path,
    overwrite: bool = False,
    formats: Sequence[str] = ("png",),
    deidentify: bool = False,
    run: dict[str, Any] | None = None,
) -> Path:
    """Writes the predictions about one scan: `answer.json`, `overlay.png`, and what `formats` asks for.

    The overlay is the picture with its regions; for several slices it shows those that have regions side by side. The
    folder appears complete or not at all.

    Args:
        predictions: of one prompt and one scan, a slice each.
        formats, deidentify: for `medsight.export.write_masks`. With `deidentify`, no file says what the image was
            called either.
        run: see `medsight.inference.prediction.describe`.

    Raises:
        FileExistsError: see `check_answer_folder`.
        ValueError: the scan cannot be written in one of the formats.
    """
    from medsight.export import mosaic, overlay, write_masks
    from medsight.export.writing import MASK_FILE
    from medsight.inference.prediction import describe, found_regions

    first = predictions[0]
    if deidentify:
        scan = copy.copy(first.scan)
        scan.name = "image"
        predictions = [dataclasses.replace(one, image_name="image", scan=scan) for one in predictions]
        first = predictions[0]
    regions = found_regions(predictions)
    content = describe(predictions, run)
    if "png" in formats:
        listed = [region for one in content.get("slices", [content]) for region in one["regions"]]
        for number, region in enumerate(listed, 1):
            region["mask"] = MASK_FILE.format(number)
    with staged_folder(folder, overwrite, check=check_answer_folder) as stage:
        write_masks(first.scan, regions, stage, formats, deidentify)
        if len(predictions) == 1:
            picture = overlay(first.image, regions)
        else:
            picture = mosaic(first.scan, regions, first.window)
        picture.save(stage / OVERLAY_FILE)
        content["files"] = sorted(path.name for path in stage.iterdir())
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        (stage / ANSWER_FILE).write_text(text + "\n", encoding="utf-8")
    return folder


def read_answer(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's `answer.json`; None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    from medsight.checkpoint import read_json

    path = folder / ANSWER_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    if not {"prompt", "volumes_ml", "run", "files"} <= content.keys() or not {"slices", "regions"} & content.keys():
        raise ValueError(f"{path} is none of this version's answers; name another folder, or remove it")
    return content


def check_answer_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that an answer cannot be written to without mixing it with, or losing, other files.

    Raises:
        FileExistsError: the folder is a file; or it is not empty and `overwrite` is false; or it holds files that are
            no part of an earlier answer, which `overwrite` does not remove.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output {folder} is a file; name a folder")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if not names:
        return
    if not overwrite:
        raise FileExistsError(f"output folder {folder} is not empty; name another one, or add --overwrite")
    try:
        earlier = read_answer(folder)
    except ValueError:
        earlier = None
    if earlier is None:
        found = f"its {ANSWER_FILE} is damaged" if ANSWER_FILE in names else f"it has no {ANSWER_FILE}"
        raise FileExistsError(
            f"output folder {folder}: only an earlier answer is overwritten, and {found}; name another"
        )
    foreign = [name for name in names if name not in (ANSWER_FILE, *earlier["files"])]
    if foreign:
        raise FileExistsError(
            f"output folder {folder}: only an earlier answer is overwritten, and it holds {foreign[0]}; name another"
        )


def safe_name(path: Path) -> str:
    """A name for the folder of an image's answer: letters, digits, '-', '_' and inner dots of the file's own."""
    stem = SUFFIXES.sub("", path.name) or path.name
    name = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", stem))[:LONGEST_NAME].strip("._-")
    return f"image-{name}" if RESERVED.fullmatch(name) else name or "image"
