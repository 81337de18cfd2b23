"""A table of images and masks: CSV, TSV or JSON lines, a row a mask, with paths relative to the file.

Columns: image, mask, target, patient, split, modality, site, finding, label_origin, orientation, dataset, licence,
source_url, spacing_mm (row and column, "0.5 0.5"); `columns` says which of them the file calls otherwise, and usual
other names (`file_name`, `mask_path`, `patient_id`, ...) are known. A row with a target and no mask says that the
structure was looked for and is absent; one without either, that there is an image. Other columns are for `where`.
"""

import csv
import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medsight.text import nearest

from ..picture_labels import LabelOptions, check_columns, image_row, label_names, masks_of
from ..records import Record, as_text, convert, json_records, path_inside, picture
from ..registry import Entry, Layout, Source, register


SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
# What a column is called here, and elsewhere: the first that a file has is read, where `columns` does not say which.
COLUMNS = {
    "image": ("image_path", "file_name", "filename", "image_file", "image_name", "img", "img_path"),
    "mask": (
        "mask_path",
        "mask_file",
        "mask_name",
        "mask_file_name",
        "segmentation",
        "segmentation_path",
        "label_path",
    ),
    "target": ("structure", "class", "class_name", "category"),
    "patient": ("patient_id", "patientid", "subject", "subject_id", "group"),
    **dict.fromkeys(("split", "modality", "site", "finding", "label_origin", "orientation", "dataset"), ()),
    **dict.fromkeys(("licence", "source_url", "spacing_mm"), ()),
}
_SAME = ("split", "patient", "modality", "site", "finding", "label_origin", "orientation", "dataset")
_ROWS = "rows of the image"  # no column


@dataclasses.dataclass(frozen=True)
class TableOptions(LabelOptions):
    """What masks show, as in `LabelOptions`, and what the file calls its columns.

    Attributes:
        columns: {column: what the file calls it}.

    Example:
        >>> TableOptions(columns={"image": "file", "mask": "lesion"}, structure="lesion").columns["mask"]
        'lesion'
    """

    columns: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_columns(self.columns, COLUMNS)


def table_rows(shard: str, source: Source) -> Iterator[Entry]:
    """One row an image, with all its masks."""
    folder = Path(source.images or Path(shard).parent)
    names = label_names(source.options.names, Path(shard).parent)

    def row_of(record: dict[str, Any], place: str, split: str) -> dict[str, Any]:
        image = picture(path_inside(folder, record["image"], place))
        masks, targets, absent, spacing = list[dict[str, Any]](), list[str](), list[str](), list[Any]()
        for about, row in record[_ROWS]:
            if row["mask"] is None:
                absent += [row["target"]] if row["target"] else []
                continue
            entry = picture(path_inside(folder, row["mask"], about))
            found = masks_of(entry, row["target"] or source.options.structure, {} if row["target"] else names)
            masks += found[0]
            targets += found[1]
            spacing += [_spacing(row["spacing_mm"], about)] * len(found[0])
        rows = [row for _, row in record[_ROWS]]
        lists = {f"{name}s": sorted({row[name] for row in rows if row[name]}) for name in ("licence", "source_url")}
        known = {name: record[name] for name in _SAME if name != "split"}
        known |= {"absent": absent, "spacing_mm": spacing, **lists}
        return image_row(source, image, masks, targets, split, place, **known)

    split = source.split_of(shard)
    yield from convert(_images(_records(Path(shard)), source, split), source, split, row_of)


def _images(records: Iterator[Record], source: Source, split: str | None) -> Iterator[Record]:
    """The records of each image together, which must agree on what is said of it; they need not be neighbours."""
    by_image = defaultdict[str, list[tuple[str, dict[str, Any]]]](list)
    for place, record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            row = _canonical(record, source, place)
            if source.takes(record, row["split"] or split):
                by_image[row["image"]].append((place, row))
        except ValueError as error:
            yield place, error
    for rows in by_image.values():
        place, first = rows[0]
        differing = [name for name in _SAME if len({row[name] for _, row in rows}) > 1]
        if differing:
            values = ", ".join(sorted({str(row[differing[0]]) for _, row in rows}))
            yield place, ValueError(f"{place}: the rows of {first['image']} disagree on {differing[0]!r}: {values}")
        else:  # the conditions of the source were met above, row by row
            yield place, {**first, **(source.where or {}), _ROWS: rows}


def _canonical(record: Mapping[str, Any], source: Source, place: str) -> dict[str, Any]:
    """What a record says, by our names of columns; an empty cell is None."""
    row: dict[str, Any] = {}
    for name, others in COLUMNS.items():
        chosen = (source.options.columns or {}).get(name)
        if chosen is not None and chosen not in record:
            raise ValueError(f"{place}: there is no column {chosen!r}: {nearest(chosen, filter(None, record))}")
        column = chosen or next((each for each in (name, *others) if each in record), None)
        value = record.get(column) if column else None
        if name == "spacing_mm":
            row[name] = value or None
        else:
            row[name] = None if value is None or value == "" else as_text(value, place, str(column)).strip()
        if name in ("image", "mask") and (column is None or name == "image" and row[name] is None):
            raise ValueError(
                f"{place}: expected a path in the column {name!r}: say which it is (columns: {{{name}: NAME}}); there "
                f"are {', '.join(map(str, filter(None, record)))}"
            )
    return row


def _spacing(value: Any, place: str) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        row, column = value if isinstance(value, list) else str(value).replace(",", " ").split()
        sizes = float(row), float(column)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: expected two numbers in 'spacing_mm', of row and column, got {value!r}") from error
    if not all(0 < size < 1e6 for size in sizes):
        raise ValueError(f"{place}: expected sizes in mm in 'spacing_mm', got {value!r}")
    return sizes


def _records(path: Path) -> Iterator[Record]:
    """The rows of a table, by its header; or the objects of a JSON file."""
    if path.suffix.lower() in (".json", ".jsonl"):
        yield from json_records(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            delimiter = max("\t,;", key=header.count)
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            for record in reader:
                place = f"{path}, line {reader.line_num}"
                if None in record or None in record.values():
                    yield (
                        place,
                        ValueError(f"{place}: expected {len(reader.fieldnames or ())} cells, as the header has"),
                    )
                else:
                    yield place, record
    except (csv.Error, UnicodeDecodeError) as error:
        yield str(path), ValueError(f"{path}: not a table in UTF-8, or a damaged one ({error})")


def is_table(file: Path, columns: Mapping[str, str] | None = None) -> bool:
    """Whether the header or first record of a file names images and masks, which `columns` may call otherwise."""
    _, record = next(_records(file), ("", ValueError("empty")))
    if isinstance(record, ValueError):
        return False
    return all({(columns or {}).get(name, name), *COLUMNS[name]} & record.keys() for name in ("image", "mask"))


def _looks_like(path: Path, record: Mapping[str, Any]) -> bool:
    if path.is_dir():  # a JSON array, which is read whole, is no folder's table unless somebody says so
        return any(is_table(file) for file in sorted(path.glob("*")) if file.suffix.lower() in SUFFIXES[:3])
    return path.suffix.lower() in SUFFIXES and is_table(path)


def _shards(source: Source) -> list[str]:
    return source.files(SUFFIXES, accepts=lambda file: is_table(Path(file), source.options.columns))


register(Layout("table", "regions", _shards, table_rows, _looks_like, TableOptions, embeds=True))
