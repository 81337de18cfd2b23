"""Images and masks in two folders, or side by side, that go together by their names.

`images/a.png` and `masks/a.png`; `train/images`, `images/train`, `train_images`; `a.jpg` beside `a_segmentation.png`;
a folder of masks a structure, `masks/liver/a.png` or `liver/a.png` beside `images/a.png`; several masks of an image,
`masks/a_liver.png`, `a_mask_1.png`. Masks are of one structure, which the folder, the file or `structure` names, or
label maps, whose values `names` names.
"""

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from medsight.text import first_few

from ..picture_labels import LabelOptions, image_row, label_names, masks_of, relative_name
from ..records import IMAGE_SUFFIXES, Record, convert, picture
from ..registry import Entry, Layout, Source, register
from ..splits import canonical_split, split_in_name


# What folders are called, in words: `JPEGImages` is "jpeg images", `GroundTruth` "ground truth".
_IMAGES = re.compile(r"\b(?:jpeg )?(?:images?|imgs?|pictures?|frames?|originals?|inputs?)\b")
_MASKS = re.compile(
    r"\b(?:masks?|label ?maps?|labels?|annotations?|segmentations?(?: class)?|segs?|gts?|ground ?truths?)\b",
    re.IGNORECASE,
)
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_SPLIT = re.compile(r"\b(?:train(?:ing)?|test(?:ing)?|val(?:id(?:at(?:ion|e))?)?|dev)\b")
_OF_THE_SYSTEM = ("thumbs.db", "desktop.ini", "__macosx")  # as are names that begin with a dot
_MOST_LOOKED_AT = 2000  # files, to say whether a folder is of this layout


@dataclasses.dataclass(frozen=True)
class PairOptions(LabelOptions):
    """What masks show, as in `LabelOptions`, and folders of other names than this layout knows.

    Attributes:
        image_folder, mask_folder: name of the folders with images, and with masks.

    Example:
        >>> PairOptions(structure="polyp", image_folder="Original", mask_folder="Drawn").mask_folder
        'Drawn'
    """

    image_folder: str | None = None
    mask_folder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_folder", "mask_folder"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"data {name}: expected the name of a folder, got {getattr(self, name)!r}")


class Found(NamedTuple):
    """A picture: where it is, what its folders say it is (None for nothing), and what is left of them."""

    file: Path
    role: str | None
    split: str | None
    rest: tuple[str, ...]


def pair_rows(shard: str, source: Source) -> Iterator[Entry]:
    """One row an image, with the masks that go by its name; a mask without an image is an error."""
    root = Path(shard)
    names = label_names(source.options.names, root)
    images, masks, unread = sort_pictures(_pictures(root, _files(root), source.options))
    matched, orphans = match_masks(images, masks)
    labelled = {image.split for image, found in matched if found}
    warnings = (
        [f"{root}: {len(unread):,} file(s) are no pictures, and not read: {first_few(unread)}"] if unread else []
    )
    for split in {image.split for image in images} - labelled if labelled else ():
        warnings.append(f"{root}: the split {split} has no masks at all, and is not read")

    def records() -> Iterator[Record]:
        for orphan in orphans:
            message = f"{orphan.file}: a mask without an image: none has its name, or the beginning of it"
            yield str(orphan.file), ValueError(message if orphan.role else f"{message}, and it is in no image folder")
        for image, found in matched:
            if image.split in labelled or not labelled:
                record = {"image": relative_name(str(image.file), source), "split": image.split}
                yield str(image.file), {**record, "file": image.file, "masks": found}

    def row_of(record: dict[str, Any], place: str, split: str) -> dict[str, Any]:
        shown, targets = list[dict[str, Any]](), list[str]()
        for mask, structure in record["masks"]:
            found = masks_of(picture(mask), structure or source.options.structure, names)
            shown += found[0]
            targets += found[1]
        return image_row(source, picture(record["file"]), shown, targets, split, place)

    for entry in convert(records(), source, None, row_of):
        yield entry._replace(warnings=tuple(warnings))
        warnings.clear()


def _files(root: Path) -> Iterator[Path]:
    """All files below a folder, in order, but for those of the system; a folder that links lead to twice once."""
    seen = set[str]()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not _is_of_the_system(name))
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(folder, name) for name in sorted(files) if not _is_of_the_system(name))


def _is_of_the_system(name: str) -> bool:
    return name.startswith(".") or name.lower() in _OF_THE_SYSTEM


def _pictures(root: Path, files: Iterable[Path], options: PairOptions) -> Iterator[Found | Path]:
    """What each picture's folders say; other files as they are, if they lie in a folder of images or masks."""
    known: dict[Path, Found] = {}
    for file in files:
        if file.parent not in known:
            known[file.parent] = _folder(file.parent.relative_to(root), options)
        folder = known[file.parent]
        if file.suffix.lower() in IMAGE_SUFFIXES:
            if file.name != file.name.encode(errors="replace").decode():
                raise ValueError(f"{file.parent}: the name {file.name!r} is not UTF-8 text: rename it")
            yield folder._replace(file=file)
        elif folder.role:
            yield file


def _folder(path: Path, options: PairOptions) -> Found:
    """What the names of folders say."""
    role, split, rest = None, None, list[str]()
    for part in path.parts:
        words = " ".join(_WORDS.findall(part)).lower()
        said = words
        if not split and (named := _SPLIT.search(words)):
            split, words = canonical_split(split_in_name(named[0]) or named[0]), _SPLIT.sub("", words, count=1)
        for kind, pattern in (("image", _IMAGES), ("mask", _MASKS)):
            if part == getattr(options, f"{kind}_folder"):
                role, words = kind, ""
            elif pattern.search(words):
                role, words = kind, pattern.sub("", words)
        if words == said:
            rest.append(part)
        elif words.strip():
            rest.append(" ".join(words.split()))
    return Found(path, role, split, tuple(rest))


def sort_pictures(found: Iterable[Found | Path]) -> tuple[list[Found], list[Found], list[str]]:
    """Images, masks, and the names of files that are no pictures.

    Beside an image folder, pictures in folders of another name are masks of what the folder is called. In one folder
    with its image, a picture with the image's name and a word such as `_mask` is its mask.
    """
    pictures, unread = list[Found](), list[str]()
    for each in found:
        pictures.append(each) if isinstance(each, Found) else unread.append(each.name)
    beside = defaultdict[Path, set[str]](set)
    for each in pictures:
        beside[each.file.parent].add(each.file.stem)
    has_images = any(each.role == "image" for each in pictures)
    images, masks = list[Found](), list[Found]()
    for each in pictures:
        stem = _stem_in(each.file.stem, beside[each.file.parent], itself=False)
        by_suffix = stem is not None and _MASKS.search(_tail(each.file.stem, stem))
        is_mask = by_suffix or each.role == "mask" or (each.role is None and has_images)
        (masks if is_mask else images).append(each)
    return images, masks, unread


def _stem_in(stem: str, known: Iterable[str] | Mapping[str, Any], itself: bool = True) -> str | None:
    """The longest of the known names that a name is, or begins with; None where there is none."""
    if itself and stem in known:
        return stem
    while match := re.fullmatch(r"(.+)[_.\s-].*", stem):
        stem = match[1]
        if stem in known:
            return stem
    return None


def _tail(stem: str, image: str) -> str:
    """What a mask's name says beyond its image's, in words."""
    return " ".join(re.split(r"[_.\s+-]+", stem[len(image) :])).strip()


def match_masks(
    images: Iterable[Found], masks: Iterable[Found]
) -> tuple[list[tuple[Found, list[tuple[Path, str | None]]]], list[Found]]:
    """Each image with its masks and the structures that folders or names tell; and the masks that have no image.

    Raises:
        ValueError: two images of a folder have one name, so that masks would belong to both.
    """
    by_folder = defaultdict[tuple[str | None, tuple[str, ...]], dict[str, Found]](dict)
    for image in images:
        stems = by_folder[image.split, image.rest]
        if (other := stems.setdefault(image.file.stem, image)) is not image:
            raise ValueError(f"{image.file} and {other.file} have the same name, so masks would belong to both")
    found = defaultdict[Path, list[tuple[Path, str | None]]](list)
    orphans = list[Found]()
    for mask in masks:
        rests = [(mask.rest, "")] + [(mask.rest[:i] + mask.rest[i + 1 :], mask.rest[i]) for i in range(len(mask.rest))]
        for rest, structure in rests:
            stems = by_folder.get((mask.split, rest), {})
            if (stem := _stem_in(mask.file.stem, stems)) is not None:
                tail = _tail(mask.file.stem, stem)
                said = " ".join(word for word in _MASKS.sub("", tail).split() if not word.isdigit())
                name = said or ("" if structure.isdigit() else re.sub(r"[_+]+", " ", structure))
                found[stems[stem].file].append((mask.file, name or None))
                break
        else:
            alone = list(by_folder.get((mask.split, mask.rest), {}).values())
            if mask.role and mask.rest and len(alone) == 1:  # a folder an image, with all of its masks
                found[alone[0].file].append((mask.file, None))
            else:
                orphans.append(mask)
    return [(image, found[image.file]) for stems in by_folder.values() for image in stems.values()], orphans


def _shards(source: Source) -> list[str]:
    if not Path(source.path).is_dir():
        raise FileNotFoundError(f"{source.path}: no such folder")
    return [source.path]


def _looks_like(path: Path, record: Mapping[str, Any]) -> bool:
    if not path.is_dir():
        return False
    images, masks, _ = sort_pictures(_pictures(path, islice(_files(path), _MOST_LOOKED_AT), PairOptions()))
    try:
        return any(found for _, found in match_masks(images, masks)[0])
    except ValueError:
        return True


register(Layout("pairs", "regions", _shards, pair_rows, _looks_like, PairOptions, embeds=True, general=True))
