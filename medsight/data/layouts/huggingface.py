"""A data set of the Hub's library with columns of pictures: saved to disk, in parquet files, or an image folder.

The path is a folder (by `save_to_disk`, with parquet files, or with pictures and a `metadata.csv` or `.jsonl`), a
parquet file, or `hf://OWNER/NAME`, which alone is downloaded; no code of a data set is run. The mask column holds one
mask (of the `target` column's structure, or of `structure`), a label map (`names`), or a list of masks beside a list
of targets.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsight.text import nearest

from ..picture_labels import LabelOptions, check_columns, image_row, label_names, masks_of
from ..records import Record, as_text, convert, path_inside, picture
from ..registry import Entry, Layout, Source, is_address, register
from ..splits import canonical_split, split_in_name


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# What a column is called here, and elsewhere.
COLUMNS = {
    "image": ("images", "img", "pixel_values"),
    "mask": ("masks", "label", "labels", "segmentation", "segmentation_mask", "annotation"),
    "target": ("targets", "structure", "structures", "class", "category"),
    "patient": ("patient_id", "subject", "subject_id"),
    **dict.fromkeys(("modality", "site", "finding", "label_origin", "orientation", "dataset"), ()),
}
_SAVED = ("dataset_dict.json", "state.json")  # by save_to_disk
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)")


@dataclasses.dataclass(frozen=True)
class HuggingFaceOptions(LabelOptions):
    """What masks show, as in `LabelOptions`, and which columns and configuration are read.

    Attributes:
        columns: {column: what the data set calls it}.
        config: configuration of a data set of the Hub.

    Example:
        >>> HuggingFaceOptions(columns={"mask": "lesion"}, structure="lesion").columns["mask"]
        'lesion'
    """

    columns: Mapping[str, str] | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_columns(self.columns, COLUMNS)
        if not isinstance(self.config, str | None):
            raise ValueError(f"data config: expected the name of a configuration, got {self.config!r}")


def huggingface_rows(shard: str, source: Source) -> Iterator[Entry]:
    """One row an image, split by split."""
    for name, rows in _load(shard, source).items():
        split = canonical_split(name) if name else None
        if source.split in (None, split) or split is None:
            yield from _rows_of_split(rows, split, shard, source)


def _rows_of_split(
    rows: "Dataset | IterableDataset", split: str | None, shard: str, source: Source
) -> Iterator[Entry]:
    names, columns = label_names(source.options.names, Path(source.path)), _columns(rows, source, shard)

    def row_of(record: dict[str, Any], place: str, split: str) -> dict[str, Any]:
        said = {name: record.get(column) for name, column in columns.items()}
        image = _picture(said.pop("image"), shard, source, f"{place}, image")
        entry, target = said.pop("mask", None), said.pop("target", None)
        entries = entry if isinstance(entry, list) else [] if entry is None else [entry]
        targets = target if isinstance(target, list) else [target] * len(entries)
        if len(targets) != len(entries) or not all(isinstance(name, str | None) for name in targets):
            raise ValueError(f"{place}: {len(entries)} mask(s) for the target(s) {target!r}")
        masks, shown = list[dict[str, Any]](), list[str]()
        for number, (each, name) in enumerate(zip(entries, targets, strict=True)):
            mask = _picture(each, shard, source, f"{place}, mask {number}")
            found = masks_of(mask, name or source.options.structure, {} if name else names)
            masks += found[0]
            shown += found[1]
        said = {name: None if value is None else as_text(value, place, name) for name, value in said.items()}
        return image_row(source, image, masks, shown, split, place, **said)

    yield from convert(_records(rows, split, f"{shard}{f', split {split}' if split else ''}"), source, split, row_of)


def _load(shard: str, source: Source) -> "dict[str, Dataset | IterableDataset]":
    """The splits of a data set, by their names; "" where its files tell none. Files here are read as they are."""
    import datasets

    path = Path(shard)
    if is_address(shard):
        match = _ADDRESS.fullmatch(shard)
        if match is None:
            raise ValueError(f"{shard}: expected hf://OWNER/NAME")
        return dict(datasets.load_dataset(match[1], name=source.options.config))
    try:
        if (path / _SAVED[0]).is_file():
            return dict(datasets.load_from_disk(shard))
        if (path / _SAVED[1]).is_file():
            return {"": datasets.load_from_disk(shard)}
        if path.suffix == ".parquet":
            told = source.split_of(shard)
            rows = datasets.load_dataset("parquet", data_files=shard, streaming=True, split="train")
            return {told or "": rows}
        found = datasets.load_dataset("imagefolder", data_dir=shard, streaming=True)
        one = list(found) == ["train"] and not any(split_in_name(child.name) for child in path.iterdir())
        return {"": found["train"]} if one else dict(found)  # the library calls "train" what is of no split
    except Exception as error:  # of damaged files, the library raises what its readers happen to meet
        if isinstance(error, ImportError):
            raise
        raise ValueError(
            f"{shard}: not a data set that the library datasets reads, or a damaged one ({error})"
        ) from error


def _columns(rows: "Dataset | IterableDataset", source: Source, place: str) -> dict[str, str]:
    """What the data set calls each column that is there."""
    found, said = list(rows.column_names or ()), source.options.columns or {}
    for column in said.values():
        if column not in found:
            raise ValueError(f"{place}: there is no column {column!r}: {nearest(column, found)}")
    columns = {
        name: said.get(name) or next((each for each in (name, *others) if each in found), "")
        for name, others in COLUMNS.items()
    }
    if not columns["image"] or not columns["mask"]:
        missing = "image" if not columns["image"] else "mask"
        raise ValueError(
            f"{place}: expected a column of each {missing}: say which it is (columns: {{{missing}: NAME}}); there are "
            f"{', '.join(found)}"
        )
    return {name: column for name, column in columns.items() if column}


def _records(rows: "Dataset | IterableDataset", split: str | None, place: str) -> Iterator[Record]:
    """The records, pictures not decoded, classes by their names; a damaged file ends with an error."""
    import datasets

    number = 0
    try:
        for name, feature in (rows.features or {}).items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
            elif isinstance(getattr(feature, "feature", None), datasets.Image):
                rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
        features = rows.features or {}
        for number, record in enumerate(rows, 1):
            for name, feature in features.items():
                classes, value = getattr(feature, "feature", feature), record[name]
                if isinstance(classes, datasets.ClassLabel) and value is not None:
                    record[name] = classes.int2str(value)
            if split is not None or not isinstance(record.get("split"), str):  # a split of the library's own counts
                record.pop("split", None)
            yield f"{place}, row {number}", record
    except Exception as error:  # of damaged files, the library raises what its readers happen to meet
        message = f"{place}: a damaged data set, after row {number} ({error})"
        yield place, ValueError(message)


def _picture(entry: Any, shard: str, source: Source, place: str) -> dict[str, Any]:
    """A picture of a record, whose bytes count where there are any; named after its place, or its file."""
    if isinstance(entry, dict) and isinstance(entry.get("bytes"), bytes):
        return {"path": place, "bytes": entry["bytes"]}
    path = entry.get("path") if isinstance(entry, dict) else None
    if path is None:
        raise ValueError(f"{place}: expected a picture, with its bytes or its path, got {str(entry)[:80]}")
    if is_address(shard):  # a file that the library has put into its cache
        return picture(path)
    folder = Path(shard) if Path(shard).is_dir() else Path(shard).parent
    return picture(path_inside(source.images or folder, path, place))


def _shards(source: Source) -> list[str]:
    path = Path(source.path)
    if is_address(source.path):
        return [source.path]
    if path.is_dir() and any((path / name).is_file() for name in (*_SAVED, *_METADATA)):
        return [source.path]
    return source.files((".parquet",), recursive=True)


def _looks_like(path: Path, record: Mapping[str, Any]) -> bool:
    if path.is_dir():
        listed = [path / name for name in _METADATA if (path / name).is_file()]
        saved = any((path / name).is_file() for name in _SAVED)
        return saved or any(b"file_name" in file.read_bytes() for file in listed)
    pictured = [any(_is_pictured(record.get(each)) for each in (name, *COLUMNS[name])) for name in ("image", "mask")]
    of_our_own = all(isinstance(target, str) for target in record.get("targets", [None]) or ())  # the layout "parquet"
    return path.suffix == ".parquet" and all(pictured) and not of_our_own


def _is_pictured(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and {"bytes", "path"} <= first.keys()


register(Layout("huggingface", "regions", _shards, huggingface_rows, _looks_like, HuggingFaceOptions, embeds=True))
