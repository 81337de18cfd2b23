"""Images with masks in BiomedParse's layout.

`SET/{train,test}/ID_MODALITY_SITE.png` are images, `SET/{train,test}_mask/ID_MODALITY_SITE_TARGET.png` their masks,
with '+' for a space in every field. Where there is a `manifest.jsonl` (a row a mask: image, mask, modality, site,
target, split, and where known group, which is the patient, finding, label_origin; `absent: true` and mask null for a
structure that is not in the image), it counts, and file names mean nothing.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import IMAGE_SUFFIXES, Item, as_text, check_regions, json_records, patient_of, required
from .splits import Member, canonical_split, divide, hold_out


if TYPE_CHECKING:
    from datasets import Dataset

    from .sources import Source

MANIFEST = "manifest.jsonl"
# What all rows of one image must agree on.
_SAME = ("modality", "site", "split", "group", "label_origin")


def split_folders(folder: Path) -> dict[str, Path]:
    """The image folders of a set by split: those that have a folder of masks beside them."""
    pairs = (child for child in sorted(folder.iterdir()) if (folder / f"{child.name}_mask").is_dir())
    return {canonical_split(child.name): child for child in pairs}


def biomedparse_shards(source: "Source") -> list[str]:
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


def biomedparse_items(shard: str, source: "Source") -> Iterator[Item]:
    """One item an image, with all its masks."""
    path = Path(shard)
    if source.images and not path.is_file():
        raise ValueError(f"{path}: images={source.images!r} is for a manifest: here the files themselves are found")
    yield from _of_manifest(path, source) if path.is_file() else _of_names(path, source)


def _of_manifest(manifest: Path, source: "Source") -> Iterator[Item]:
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
            yield Item(place, error=error)
            continue
        if image.startswith(prefix) and source.takes(record, split):
            rows[image].append({**record, "split": split})
    for image, some in rows.items():
        place = f"{manifest}: {image}"
        differing = [name for name in _SAME if len({row.get(name) for row in some}) > 1]
        if differing:
            values = sorted({str(row.get(differing[0])) for row in some})
            yield Item(place, error=ValueError(f"{place}: its rows disagree on {differing[0]!r}: {', '.join(values)}"))
            continue
        known_leak = any(row.get("same_volume_in_train") for row in some)
        try:
            row = _row(Path(source.images) if source.images else manifest.parent, image, some)
            check_regions(row, place)
            yield Item(place, row, known_leak=known_leak)
        except ValueError as error:
            yield Item(place, error=error)


def _row(root: Path, image: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    first, present = rows[0], [row for row in rows if not row.get("absent")]
    parts = Path(image).parts
    dataset = parts[0] if len(parts) > 2 else root.absolute().name
    return {
        "image": {"path": str(root / image), "bytes": None},
        "masks": [{"path": str(root / row["mask"]), "bytes": None} for row in present],
        "targets": [row["target"] for row in present],
        "absent": [row["target"] for row in rows if row.get("absent")],
        "finding": next((row["finding"] for row in rows if row.get("finding")), None),
        "label_origin": first.get("label_origin"),
        "dataset": dataset,
        "modality": first["modality"],
        "site": first["site"],
        "split": first["split"],
        "patient": patient_of(first.get("group")) or f"{dataset}:{Path(image).stem}",
    }


def _of_names(folder: Path, source: "Source") -> Iterator[Item]:
    for split, images in split_folders(folder).items():
        masks = images.with_name(f"{images.name}_mask")
        for file in (*_listed(images), *_listed(masks)):
            if not _is_text(file):
                yield Item(str(file), error=ValueError(f"{file}: its name is not UTF-8 text: rename it"))
        by_stem: dict[str, Path] = {}
        for file in _pictures(images):
            if file.stem in by_stem:
                error = ValueError(
                    f"{file}: {by_stem[file.stem].name} has the same name, so masks would belong to both"
                )
                yield Item(str(file), error=error)
            by_stem.setdefault(file.stem, file)
        found: dict[str, list[tuple[str, Path]]] = defaultdict(list)
        for file in _pictures(masks):
            stem, target = file.stem, ""
            while stem not in by_stem and "_" in stem:
                stem, _, last = stem.rpartition("_")
                target = f"{last}_{target}" if target else last
            if stem in by_stem and target:
                found[stem].append((target.replace("+", " "), file))
            else:
                wanted = f"expected the name of an image in {images}, then _TARGET"
                yield Item(str(file), error=ValueError(f"{file}: a mask without an image: {wanted}"))
        for stem, file in by_stem.items():
            fields = stem.rsplit("_", 2)
            if len(fields) < 3 or not all(fields):
                error = ValueError(f"{file}: expected a name such as ID_MODALITY_SITE{file.suffix}, got {file.name}")
                yield Item(str(file), error=error)
                continue
            identity, modality, site = (part.replace("+", " ") for part in fields)
            row = {
                "image": {"path": str(file), "bytes": None},
                "masks": [{"path": str(path), "bytes": None} for _, path in found[stem]],
                "targets": [target for target, _ in found[stem]],
                "absent": [],
                "finding": None,
                "label_origin": None,
                "dataset": folder.absolute().name,
                "modality": modality,
                "site": site,
                "split": split,
                "patient": f"{folder.absolute().name}:{identity}",
            }
            if source.takes(row, split):
                yield Item(str(file), row)


def _listed(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)


def _pictures(folder: Path) -> list[Path]:
    return [file for file in _listed(folder) if _is_text(file)]


def _is_text(file: Path) -> bool:
    """Whether a name can be written down: neither the rows of `datasets` nor JSON hold one that is not UTF-8."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return False
    return True


def split_validation(rows: "Dataset", fraction: float, seed: int) -> tuple["Dataset", "Dataset"]:
    """Hold out images for validation, by patient, as `splits.hold_out` says; only columns of text are read.

    Args:
        rows: of `schema.REGION_FEATURES`, map-style.
        fraction: of every data set's patients; 0 holds out none.
        seed: of the choice.

    Returns:
        Training and validation rows.

    Raises:
        ValueError: see `splits.hold_out`.
    """
    import pyarrow.compute as pc

    if not len(rows):
        return rows, rows
    names: list[str | None] = []
    for batch in rows.select_columns(["image"]).with_format("arrow").iter(batch_size=1000):
        names += pc.struct_field(batch["image"].combine_chunks(), "path").to_pylist()
    origin = rows.select_columns(["dataset", "patient", "modality"])
    members = (
        Member(row["dataset"] or "", row["patient"] or name or f"row {i}", row["modality"] or "", name or f"row {i}")
        for i, (row, name) in enumerate(zip(origin, names, strict=True))
    )
    return divide(rows, hold_out(members, fraction, seed))
