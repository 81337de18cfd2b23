"""Images with masks in BiomedParse's layout.

`SET/{train,test}/ID_MODALITY_SITE.png` are images, `SET/{train,test}_mask/ID_MODALITY_SITE_TARGET.png` their masks,
with '+' for a space in every field. Where there is a `manifest.jsonl` (a row a mask: image, mask, modality, site,
target, split, and where known group, which is the patient, finding, label_origin; `absent: true` and mask null for a
structure that is not in the image), it counts, and file names mean nothing.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..records import IMAGE_SUFFIXES, as_text, check_regions, json_records, patient_of, required
from ..registry import Entry, Layout, Source, register
from ..schema import region_row
from ..splits import canonical_split


MANIFEST = "manifest.jsonl"
# What all rows of one image must agree on.
_SAME = ("modality", "site", "split", "group", "label_origin")


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
    if (path / MANIFEST).is_file():
        return [str(path / MANIFEST)]
    if split_folders(path):
        # One set of a folder that has a manifest: the patients stand there.
        above = path.absolute().parent / MANIFEST
        return [str(above if above.is_file() else path)]
    sets = [child for child in sorted(path.iterdir()) if child.is_dir() and split_folders(child)]
    if not sets:
        raise ValueError(f"{path}: no {MANIFEST}, and no folder such as train beside a train_mask in it or one below")
    return [str(folder / MANIFEST if (folder / MANIFEST).is_file() else folder) for folder in sets]


def biomedparse_rows(shard: str, source: Source) -> Iterator[Entry]:
    """One row an image, with all its masks."""
    path = Path(shard)
    if source.images and not path.is_file():
        raise ValueError(f"{path}: images={source.images!r} is for a manifest: here the files themselves are found")
    yield from _of_manifest(path, source) if path.is_file() else _of_names(path, source)


def _of_manifest(manifest: Path, source: Source) -> Iterator[Entry]:
    only = Path(source.path).absolute()
    prefix = f"{only.name}/" if only.is_dir() and only.parent == manifest.absolute().parent else ""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for place, record in json_records(manifest):
        try:
            if isinstance(record, ValueError):
                raise record
            image = as_text(required(record, place, "image"), place, "image")
            for name in ("modality", "site", "target", "split"):
                as_text(required(record, place, name), place, name)
            if bool(record.get("absent")) == bool(record.get("mask")):
                raise ValueError(f"{place}: expected a mask, or `absent: true` and mask null; got {record}")
            split = canonical_split(record["split"])
        except ValueError as error:
            yield Entry(place, error=error)
            continue
        if image.startswith(prefix) and source.takes(record, split):
            rows[image].append({**record, "split": split})
    for image, records in rows.items():
        place = f"{manifest}: {image}"
        try:
            row = _manifest_row(Path(source.images) if source.images else manifest.parent, image, records, place)
            yield Entry(place, row, known_leak=any(record.get("same_volume_in_train") for record in records))
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
        {"path": str(root / image), "bytes": None},
        [{"path": str(root / record["mask"]), "bytes": None} for record in present],
        [record["target"] for record in present],
        **{name: first[name] for name in ("modality", "site", "split")},
        spacing_mm=[_pixel_size(record.get("voxel_mm")) for record in present],
        absent=[record["target"] for record in records if record.get("absent")],
        finding=next((record["finding"] for record in records if record.get("finding")), None),
        label_origin=first.get("label_origin"),
        dataset=dataset,
        patient=patient_of(first.get("group")) or f"{dataset}:{Path(image).stem}",
    )
    check_regions(row, place)
    return row


def _pixel_size(voxel_mm: Any) -> tuple[float, float] | None:
    """(row, column) in mm, of a picture or of an isotropic volume: a slice of another may lie along any axis."""
    size = list(map(float, voxel_mm)) if isinstance(voxel_mm, list) else []
    return (size[0], size[1]) if len(size) == 2 or (len(size) == 3 and len(set(size)) == 1) else None


def _of_names(folder: Path, source: Source) -> Iterator[Entry]:
    dataset = folder.absolute().name
    for split, images in split_folders(folder).items():
        masks = images.with_name(f"{images.name}_mask")
        by_stem: dict[str, Path] = {}
        found: dict[str, list[tuple[str, Path]]] = defaultdict(list)
        for file in (*_pictures(images), *_pictures(masks)):
            stem, target = file.stem, ""
            if not _is_text(str(file)):
                yield _bad(file, "its name is not UTF-8 text: rename it")
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
                    yield _bad(
                        file, f"a mask without an image: expected the name of an image in {images}, then _TARGET"
                    )
        for stem, file in by_stem.items():
            fields = stem.rsplit("_", 2)
            if len(fields) < 3 or not all(fields):
                yield _bad(file, f"expected a name such as ID_MODALITY_SITE{file.suffix}, got {file.name}")
                continue
            identity, modality, site = (part.replace("+", " ") for part in fields)
            row = region_row(
                {"path": str(file), "bytes": None},
                [{"path": str(path), "bytes": None} for _, path in found[stem]],
                [target for target, _ in found[stem]],
                split,
                **{"dataset": dataset, "modality": modality, "site": site, "patient": f"{dataset}:{identity}"},
            )
            if source.takes(row, split):
                yield Entry(str(file), row)


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)


def _bad(file: Path, problem: str) -> Entry:
    return Entry(str(file), error=ValueError(f"{file}: {problem}"))


def _is_text(name: str) -> bool:
    """Whether a name can be written down: neither the rows of `datasets` nor JSON hold one that is not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _looks_like(path: Path, record: Mapping[str, Any] | None) -> bool:
    if not path.is_dir():
        return record is not None and {"mask", "target"} <= set(record)
    if (path / MANIFEST).is_file() or split_folders(path):
        return True
    return any(child.is_dir() and split_folders(child) for child in path.iterdir())


register(Layout("biomedparse", "regions", biomedparse_shards, biomedparse_rows, _looks_like))
