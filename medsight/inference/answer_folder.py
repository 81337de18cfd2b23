"""The folder of an answer: recognised when it is finished, never mixed with other files. Loads no model."""

import re
import unicodedata
from pathlib import Path
from typing import Any

from medsight.checkpoint import read_json


ANSWER_FILE = "answer.json"
OVERLAY_FILE = "overlay.png"
LONGEST_NAME = 60  # characters: of any script, below what file systems take
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", flags=re.IGNORECASE)  # by Windows
SUFFIXES = re.compile(r"(\.nii)?\.[A-Za-z0-9]{1,5}$")


def read_answer(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's `answer.json`; None where there is none, a ValueError where it is damaged."""
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
        known = [] if earlier is None else [ANSWER_FILE, *earlier["files"]]
    except ValueError:  # it is damaged
        known = []
    if foreign := [name for name in names if name not in known]:
        raise FileExistsError(
            f"output folder {folder}: only an earlier answer is overwritten, and {foreign[0]} is no part of one; name "
            "another"
        )


def safe_name(path: Path) -> str:
    """A name for the folder of an image's answer: letters, digits, '-', '_' and inner dots of the file's own."""
    stem = SUFFIXES.sub("", path.name) or path.name
    name = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", stem))[:LONGEST_NAME].strip("._-")
    return f"image-{name}" if RESERVED.fullmatch(name) else name or "image"
