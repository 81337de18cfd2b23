"""Instances in COCO's JSON: images, annotations with polygons or run lengths, categories.

A file, or a folder of files named after splits (`annotations/instances_train2017.json`,
`train/_annotations.coco.json`). Images lie where `file_name` leads from the JSON file, from `images`, or from a folder
found beside the file. An annotation is a mask of its category; a crowd is one mask. Boxes are no masks, and refused.
"""

import json
import mmap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from processing_medsight.image_loading_medsight import MAX_IMAGE_PIXELS

from ..picture_labels import BACKGROUND, image_row, polygon_mask, rle_mask
from ..pictures import encode_mask, picture_size
from ..records import Record, as_text, convert, path_inside, patient_of, picture
from ..registry import Entry, Layout, Source, register
from ..splits import split_in_name


_KEYS = ("images", "annotations", "categories")
_MOST_LOOKED_AT = 50  # files, to say whether a folder is of this layout
# Of an image, beside what COCO says: what rows hold too.
_KNOWN = ("modality", "site", "finding", "label_origin", "orientation")


def coco_rows(shard: str, source: Source) -> Iterator[Entry]:
    """One row an image, with a mask an annotation."""
    content = _read(Path(shard))
    split = source.split_of(shard)
    images = [image for image in content["images"] if isinstance(image, dict)]
    first = next((image.get("file_name") for image in images), None)
    folder = Path(source.images) if source.images else _image_folder(Path(shard), first, split)
    names = {}
    for category in content["categories"]:
        if not isinstance(category, dict) or not isinstance(category.get("id"), int):
            raise ValueError(f"{shard}: expected categories with id and name, got {category!r}")
        names[category["id"]] = as_text(category.get("name"), f"{shard}, category {category['id']}", "name")

    def row_of(record: dict[str, Any], place: str, split: str) -> dict[str, Any]:
        image = picture(path_inside(folder, record.get("file_name"), place))
        size = _size(record, image, place)
        masks, targets = list[dict[str, Any]](), list[str]()
        for annotation in record["annotations"]:
            about = f"{place}, annotation {annotation.get('id')}"
            if (number := annotation.get("category_id")) not in names:
                raise ValueError(f"{about}: no category has the id {number!r}, only {sorted(names)}")
            mask = _mask(annotation.get("segmentation"), size, about)
            if mask.any() and names[number].lower() not in BACKGROUND:
                masks.append(encode_mask(mask, f"{image['path']}, {names[number]} {annotation.get('id')}"))
                targets.append(names[number])
        known = {name: as_text(record[name], place, name) for name in _KNOWN if record.get(name) is not None}
        patient = patient_of(record.get("patient") or record.get("patient_id"))
        return image_row(source, image, masks, targets, split, place, patient=patient, **known)

    yield from convert(_records(content, shard), source, split, row_of)


def _read(path: Path) -> dict[str, Any]:
    """The content of a file of instances; raises ValueError, naming it, where it is none."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, or damaged ({error})") from error
    missing = [key for key in _KEYS if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise ValueError(f"{path}: expected COCO's instances, with lists {', '.join(_KEYS)}: no list {missing[0]!r}")
    found: dict[str, Any] = content
    return found


def _records(content: dict[str, Any], shard: str) -> Iterator[Record]:
    """The images with their annotations; what belongs to no image, or to two, as an error."""
    by_image = defaultdict[Any, list[dict[str, Any]]](list)
    images: dict[Any, dict[str, Any]] = {}
    for number, image in enumerate(content["images"]):
        place = f"{shard}, image {number}"
        if not isinstance(image, dict) or not isinstance(image.get("id"), int | str):
            yield place, ValueError(f"{place}: expected id and file_name, got {str(image)[:80]}")
        elif images.setdefault(image["id"], image) is not image:
            yield place, ValueError(f"{place}: another image has the id {image['id']!r} too")
    for number, annotation in enumerate(content["annotations"]):
        place = f"{shard}, annotation {number}"
        owner = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(owner, int | str) or owner not in images:
            yield place, ValueError(f"{place}: expected the image_id of an image, got {owner!r}")
        elif not isinstance(annotation.get("category_id"), int):
            yield place, ValueError(f"{place}: expected the category_id of a category")
        else:
            by_image[owner].append(annotation)
    for key, image in images.items():
        split = image.get("split")
        place = f"{shard}, image {str(image.get('file_name'))[:80]}"
        yield place, {**image, "split": split if isinstance(split, str) else None, "annotations": by_image[key]}


def _size(record: Mapping[str, Any], image: Mapping[str, Any], place: str) -> tuple[int, int]:
    """(width, height) that a record states, or that its picture has."""
    width, height = record.get("width"), record.get("height")
    if width is None and height is None:
        return picture_size(image)
    if (
        type(width) is not int
        or type(height) is not int
        or min(width, height) < 1
        or width * height > MAX_IMAGE_PIXELS
    ):
        raise ValueError(
            f"{place}: expected width and height in pixels, at most {MAX_IMAGE_PIXELS:,}, got {width!r} and {height!r}"
        )
    return width, height


def _mask(segmentation: Any, size: tuple[int, int], place: str) -> Any:
    if isinstance(segmentation, dict):
        stated = segmentation.get("size")
        if stated != [size[1], size[0]]:
            raise ValueError(f"{place}: run lengths of the size {stated}, for an image of [{size[1]}, {size[0]}]")
        return rle_mask(segmentation.get("counts"), size, place)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"{place}: expected polygons or run lengths in 'segmentation': a box is no mask")
    return polygon_mask(segmentation, size, place)


def _image_folder(file: Path, name: Any, split: str | None) -> Path:
    """The folder that a file name starts from: the JSON file's, or one beside it, of the same split before others."""
    if not isinstance(name, str) or not name or "\0" in name or (file.parent / name).is_file():
        return file.parent
    split = split or split_in_name(file.name)
    near = [parent for parent in (file.parent, file.absolute().parent.parent) if parent.is_dir()]
    folders = [child for parent in near for pattern in ("*", "*/*") for child in sorted(parent.glob(pattern))]
    found = [folder for folder in folders if folder.is_dir() and (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{file}: no image {name!r} in its folder or one beside it: name the folder that file_name starts from "
            "(images: DIR)"
        )
    return min(found, key=lambda folder: split_in_name(folder.name) != split)


def is_coco(file: str | Path) -> bool:
    """Whether a JSON file speaks of images, annotations and categories."""
    if not Path(file).stat().st_size:
        return False
    with Path(file).open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return all(content.find(f'"{key}"'.encode()) >= 0 for key in _KEYS)


def _json_files(folder: Path) -> list[Path]:
    """Those of a folder and of the folders in it."""
    return [file for pattern in ("*.json", "*/*.json") for file in sorted(folder.glob(pattern)) if file.is_file()]


def _shards(source: Source) -> list[str]:
    near = {str(file) for file in _json_files(Path(source.path))}
    return source.files((".json",), recursive=True, accepts=lambda file: (file in near or not near) and is_coco(file))


def _looks_like(path: Path, record: Mapping[str, Any]) -> bool:
    files = _json_files(path) if path.is_dir() else [path] if path.suffix == ".json" and path.is_file() else []
    return any(map(is_coco, files[:_MOST_LOOKED_AT]))


register(Layout("coco", "regions", _shards, coco_rows, _looks_like, embeds=True))
