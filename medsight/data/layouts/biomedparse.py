"""Images with masks in BiomedParse's layout.

`SET/{train,test}/ID_MODALITY_SITE.png` are images, `SET/{train,test}_mask/ID_MODALITY_SITE_TARGET.png` their masks,
with '+' for a space in every field. Where there is a `manifest.jsonl` (a row a mask: image, mask, modality, site,
target, split, and where known group or patient, finding, label_origin, licence, source_url, voxel_mm; `absent: true`
and mask null for a structure that is not in the image), it counts, and file names mean nothing.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medsight.text import nearest

from ..records import IMAGE_SUFFIXES, as_text, check_regions, json_records, patient_of, picture, refuse_misspelt
from ..registry import Entry, Layout, Source, register
from ..schema import region_row
from ..splits import canonical_split, split_in_name


MANIFEST = "manifest.jsonl"
# What all rows of one image must agree on.
_SAME = ("modality", "site", "split", "group", "patient", "label_origin", "orientation")
_FIELDS = {*_SAME, "image", "mask", "target", "absent", "finding", "licence", "source_url", "voxel_mm"}
_FIELDS |= {"tier", "same_volume_in_train"}
_NEEDED = ("modality", "site", "target", "split")
_OF_THE_SYSTEM = ("thumbs.db", "desktop.ini")  # as are names that begin with a dot


def split_folders(folder: Path) -> dict[str, Path]:
    """The image folders of a set by split: those that have a folder of masks beside them."""
    pairs = (child for child in sorted(folder.iterdir()) if (folder / f"{child.name}_mask").is_dir())
    return {canonical_split(child.name): child for child in pairs}


def biomedparse_shards(source: Source) -> list[str]:
    """The manifests, or where there is none the folders, of a set or of a folder of sets.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is neither a set nor a folder of sets.
    """
    path = Path(source.path)
    if path.is_file() and path.suffix == ".jsonl":
        return [str(path)]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    found = _manifests_or_sets(path)
    if not found:
        raise ValueError(f"{path}: no {MANIFEST}, and no folder such as train beside a train_mask in it or one below")
    # One set of a folder that has a manifest: the patients stand there.
    above = path.absolute().parent / MANIFEST
    return [str(above)] if found == [path] and above.is_file() else list(map(str, found))


def _manifests_or_sets(folder: Path, depth: int = 1) -> list[Path]:
    if (folder / MANIFEST).is_file():
        return [folder / MANIFEST]
    if split_folders(folder):
        return [folder]
    below = [child for child in sorted(folder.iterdir()) if child.is_dir()] if depth else []
    return [found for child in below for found in _manifests_or_sets(child, depth - 1)]


def biomedparse_rows(shard: str, source: Source) -> Iterator[Entry]:
    """One row an image, with all its masks."""
    path = Path(shard)
    if source.images and not path.is_file():
        raise ValueError(f"{path}: images={source.images!r} is for a manifest: here the files themselves are found")
    yield from _of_manifest(path, source) if path.is_file() else _of_names(path, source)


def _of_manifest(manifest: Path, source: Source) -> Iterator[Entry]:
    root = Path(source.images or manifest.parent)
    only = Path(source.path).absolute()
    prefix = f"{only.name}/" if only.is_dir() and only.parent == manifest.absolute().parent else ""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    unused: dict[str, str] = {}  # unknown field -> what to say of it
    for place, record in json_records(manifest):
        try:
            if isinstance(record, ValueError):
                raise record
            for name in ("image", *_NEEDED):
                as_text(record.get(name), place, name)
            refuse_misspelt(record, _FIELDS, place)
            for name in record.keys() - _FIELDS - (source.where or {}).keys() - unused.keys():
                unused[name] = f"{place}: the field {name!r} is unknown, and not used: {nearest(name, _FIELDS)}"
            if bool(record.get("absent")) == bool(record.get("mask")):
                raise ValueError(f"{place}: expected a mask, or `absent: true` and mask null; got {record}")
        except ValueError as error:
            yield Entry(place, error=error)
            continue
        split = canonical_split(record["split"])
        if record["image"].startswith(prefix) and source.takes(record, split):
            rows[record["image"]].append({**record, "split": split})
    for image, records in rows.items():
        place = f"{manifest}: {image}"
        try:
            row = _manifest_row(root, image, records, place)
            leaks = any(record.get("same_volume_in_train") for record in records)
            yield Entry(place, row, known_leak=leaks, warnings=tuple(unused.values()))
            unused.clear()
        except ValueError as error:
            yield Entry(place, error=error)


def _manifest_row(root: Path, image: str, records: list[dict[str, Any]], place: str) -> dict[str, Any]:
    for name in _SAME:
        values = {str(record.get(name)) for record in records}
        if len(values) > 1:
            raise ValueError(f"{place}: its rows disagree on {name!r}: {', '.join(sorted(values))}")
    first, present = records[0], [record for record in records if not record.get("absent")]
    parts = Path(image).parts
    dataset = parts[0] if len(parts) > 2 else root.absolute().name
    row = region_row(
        picture(root / image),
        [picture(root / record["mask"]) for record in present],
        [record["target"] for record in present],
        **{name: first[name] for name in ("modality", "site", "split")},
        spacing_mm=[_pixel_size(record.get("voxel_mm")) for record in present],
        licences=sorted({_licence(record) for record in records if record.get("licence")}),
        source_urls=sorted({record["source_url"] for record in records if record.get("source_url")}),
        absent=[record["target"] for record in records if record.get("absent")],
        finding=next((record["finding"] for record in records if record.get("finding")), None),
        label_origin=first.get("label_origin"),
        orientation=first.get("orientation"),
        dataset=dataset,
        patient=patient_of(first.get("group")) or patient_of(first.get("patient")) or f"{dataset}:{Path(image).stem}",
    )
    check_regions(row, place)
    return row


def _licence(record: dict[str, Any]) -> str:
    return f"{record['licence']}, not verified at the source" if record.get("tier") == "B" else record["licence"]


def _pixel_size(voxel_mm: Any) -> tuple[float, float] | None:
    """(row, column) in mm, of a picture or of an isotropic volume: a slice of another may lie along any axis."""
    size = list(map(float, voxel_mm)) if isinstance(voxel_mm, list) else []
    return (size[0], size[1]) if len(size) == 2 or (len(size) == 3 and len(set(size)) == 1) else None


def _of_names(folder: Path, source: Source) -> Iterator[Entry]:
    dataset = folder.absolute().name
    pairs = split_folders(folder)
    paired = {name for images in pairs.values() for name in (images.name, f"{images.name}_mask")}
    for child in sorted(folder.iterdir()):
        split = canonical_split(re.sub("_masks?$", "", child.name))
        named = split == split_in_name(split) and source.split in (None, split)
        if named and child.is_dir() and child.name not in paired:
            yield _bad(child, "expected two folders, SPLIT with images and SPLIT_mask with their masks, got one")
    for split, images in pairs.items():
        masks = images.with_name(f"{images.name}_mask")
        by_stem: dict[str, Path] = {}
        found: dict[str, list[tuple[str, Path]]] = defaultdict(list)
        for file in (*_files(images), *_files(masks)):
            stem, target = file.stem, ""
            if file.name != file.name.encode(errors="replace").decode():  # neither rows nor JSON hold such a name
                yield _bad(file, "its name is not UTF-8 text: rename it")
            elif file.suffix.lower() not in IMAGE_SUFFIXES:
                known = ", ".join(IMAGE_SUFFIXES)
                yield _bad(file, f"expected a picture ({known}); save a volume slice by slice, and move other files")
            elif file.parent == images:
                if stem in by_stem:
                    yield _bad(file, f"{by_stem[stem].name} has the same name, so masks would belong to both")
                by_stem.setdefault(stem, file)
            else:
                while stem not in by_stem and "_" in stem:
                    stem, _, last = stem.rpartition("_")
                    target = f"{last}_{target}" if target else last
                if stem in by_stem and target:
                    found[stem].append((target.replace("+", " "), file))
                else:
                    yield _bad(file, f"a mask without an image: expected an image's name in {images}, then _TARGET")
        for stem, file in by_stem.items():
            fields = stem.rsplit("_", 2)
            if len(fields) < 3 or not all(fields):
                yield _bad(file, f"expected a name such as ID_MODALITY_SITE{file.suffix}, got {file.name}")
                continue
            identity, modality, site = (part.replace("+", " ") for part in fields)
            row = region_row(
                picture(file),
                [picture(path) for _, path in found[stem]],
                [target for target, _ in found[stem]],
                split,
                **{"dataset": dataset, "modality": modality, "site": site, "patient": f"{dataset}:{identity}"},
            )
            if source.takes(row, split):
                yield Entry(str(file), row)


def _files(folder: Path) -> list[Path]:
    """What is in a folder, but for files that an operating system leaves there."""
    names = ((file.name.lower(), file) for file in folder.iterdir())
    return sorted(file for name, file in names if not name.startswith(".") and name not in _OF_THE_SYSTEM)


def _bad(file: Path, problem: str) -> Entry:
    return Entry(str(file), error=ValueError(f"{file}: {problem}"))


def _looks_like(path: Path, record: Mapping[str, Any]) -> bool:
    if path.is_dir():
        return bool(_manifests_or_sets(path))
    return path.suffix == ".jsonl" and {"image", "mask", *_NEEDED} <= record.keys()


register(Layout("biomedparse", "regions", biomedparse_shards, biomedparse_rows, _looks_like))
