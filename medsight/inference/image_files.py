"""The images that arguments name: files, patterns, folders of pictures, folders of a DICOM series."""

import glob
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from medsight.scans.dicom_file import read_header
from medsight.scans.file_kinds import recognise

from .answer_folder import ANSWER_FILE


@dataclass
class ImageFiles:
    """What was found.

    Attributes:
        images: files, and folders of one DICOM series each, in the order of the arguments and then by name.
        left_out: what lies in the folders, or matches the patterns, and is no image; folders in folders too.
        repeated: other names of images, by links, that are found already.
        is_single: there is one argument, and it names an image itself.
    """

    images: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    repeated: list[Path] = field(default_factory=list)
    is_single: bool = False


def find_images(arguments: Sequence[str]) -> ImageFiles:
    """The images behind the arguments. Hidden files do not count. Folders are not searched for folders: a
    pattern (`study/*`) names those.

    Raises:
        OSError: there is no such file, or nothing matches a pattern.
        ValueError: a folder holds several DICOM series, or no image at all.
    """
    found = ImageFiles()
    for argument in arguments:
        if not argument:
            raise ValueError("the name of an image is empty: expected a file, a folder or a pattern")
        path = Path(argument)
        if path.is_dir():
            before = len(found.images)
            _add_folder(path, found)
            if len(found.images) == before:
                holds_folders = any(child.is_dir() for child in path.iterdir())
                way_out = f"by a pattern, name the folders in it ('{path}/*')" if holds_folders else "name files"
                raise ValueError(f"{path} is a folder without an image: {way_out}")
        elif path.exists():
            found.images.append(path)
        elif glob.has_magic(argument):
            matches = sorted(glob.glob(argument, recursive=True))
            if not matches:
                raise FileNotFoundError(f"nothing matches {argument}")
            for match in map(Path, matches):
                if match.is_dir():
                    _add_folder(match, found)
                elif match.parent not in found.images:  # a series of which it is a part
                    _add_file(match, found)
        else:
            raise FileNotFoundError(f"{argument}: there is no such file or folder")
    first: dict[Path, Path] = {}
    for path in dict.fromkeys(found.images):
        if first.setdefault(path.resolve(), path) is not path:
            found.repeated.append(path)
    found.images = list(first.values())
    if not found.images:
        raise ValueError(f"no image among what {' '.join(arguments)} names")
    found.is_single = len(arguments) == 1 and found.images == [Path(arguments[0])]
    return found


def image_content(image: Path) -> list[Path]:
    """The files that decide on what an image looks like: of a folder, those of DICOM."""
    return sorted(filter(_is_dicom, image.iterdir())) if image.is_dir() else [image]


def _is_dicom(path: Path) -> bool:
    if not path.is_file() or path.name.startswith(".") or path.name == "DICOMDIR":
        return False
    try:
        return recognise(path, str(path)) == "dicom"
    except ValueError:
        return True  # whatever is wrong with it is said when it is read


def _add_folder(folder: Path, found: ImageFiles) -> None:
    if (folder / ANSWER_FILE).exists():
        found.left_out.append(folder)
        return
    dicom: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            found.left_out.append(path)
        elif path.is_file() and not path.name.startswith("."):
            _add_file(path, found, dicom)
    series = Counter(map(_series_of, dicom))
    longest = max(series.values(), default=0)
    if longest > 1 and len(series) > 1:
        raise ValueError(
            f"{folder} holds {len(series)} DICOM series, one of them of {longest} files: put each into a folder of "
            f"its own, or name single files by a pattern ('{folder}/*')"
        )
    found.images += [folder] if longest > 1 else dicom


def _add_file(path: Path, found: ImageFiles, dicom: list[Path] | None = None) -> None:
    """Adds what may be an image; DICOM files go to `dicom`, where it is given. Damaged ones are found out later."""
    try:
        kind = recognise(path, str(path))
        if kind == "image":
            with Image.open(path):
                pass
    except UnidentifiedImageError:
        found.left_out.append(path)
        return
    except Exception:
        # Whatever is wrong with it is said when it is its turn.
        kind = "image"
    if path.name == "DICOMDIR":
        found.left_out.append(path)
    elif kind == "dicom" and dicom is not None:
        dicom.append(path)
    else:
        found.images.append(path)


def _series_of(path: Path) -> str:
    """A key of a file's series: files without an identifier are one where they have a place in space."""
    try:
        header = read_header(path, str(path))
    except ValueError:
        return str(path)
    return str(header.get("SeriesInstanceUID") or ("" if header.get("ImagePositionPatient") else path))
