"""A data set of any layout as parquet shards of this package's own rows, pictures in them: `medsight data convert`."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from medsight.files import check_empty, staged_folder, write_text

from .check import Report, count
from .picture_labels import relative_name
from .pictures import picture_name
from .registry import Entry, Source
from .schema import STORED_FEATURES
from .shards import SplitWriter, card_front, markdown_table
from .sources import iterate, kind_of, nothing_found


def pack(source: Source, output: str | Path) -> Report:
    """Write the rows of a source as parquet shards with a README.md, which the layout `parquet` reads back.

    Rows are as the source says: renamed, with what is absent by its coverage, with its split. Pictures are copied byte
    for byte, named as they lie in the data. At most one row group is held in memory.

    Args:
        output: folder that appears whole or not at all; may exist if it is empty.

    Returns:
        What was written, counted as by `check`; no picture was decoded.

    Raises:
        OSError: the output folder is not empty or cannot be written; a picture is missing.
        ValueError: a row is bad, or there is none.
    """
    kind, writers = kind_of(source), dict[str, SplitWriter]()
    licences, addresses = set[str](), set[str]()
    with staged_folder(Path(output), False, check_empty) as folder:
        with ExitStack() as stack:

            def written() -> Iterator[Entry]:
                for entry in iterate(source):
                    row = entry.checked()
                    split = row["split"]
                    if split not in writers:
                        writer = SplitWriter(folder, split, STORED_FEATURES[kind])
                        writers[split] = stack.enter_context(closing(writer))
                    writers[split].write(_stored(row, source, entry.known_leak))
                    licences.update(row.get("licences") or ())
                    addresses.update(row.get("source_urls") or ())
                    yield entry

            report = count(written())
        if not writers:
            raise ValueError(nothing_found(source))
        _write_card(folder, source, report, sorted(licences), sorted(addresses))
    return report


def _stored(row: Mapping[str, Any], source: Source, known_leak: bool) -> dict[str, Any]:
    """A row with its pictures' bytes."""

    def stored(entry: Mapping[str, Any]) -> dict[str, Any]:
        content = entry["bytes"]
        name = picture_name(entry)
        return {"path": relative_name(name, source), "bytes": Path(name).read_bytes() if content is None else content}

    pictures: dict[str, Any] = {name: list(map(stored, row[name])) for name in ("images", "masks") if name in row}
    if "image" in row:
        pictures["image"] = stored(row["image"])
    return {**row, **pictures, "image_in_test": known_leak}


def _write_card(folder: Path, source: Source, report: Report, licences: list[str], addresses: list[str]) -> None:
    splits, counts = report.counts["rows"], report.counts
    names = [name for name, by_split in counts.items() if any(by_split.values())]
    by_split = [(split, *(f"{counts[name][split]:,}" for name in names)) for split in splits]
    tables = {
        "By split": markdown_table(("split", *names), by_split),
        "By structure": _by_split("structure", report.targets, splits),
        "By modality and site": _by_split("modality / site", report.origins, splits),
    }
    sections = [
        card_front(splits, "image-segmentation" if kind_of(source) == "regions" else "image-text-to-text"),
        f"# {source.name}",
        f"Read from the layout `{source.layout}` and written by `medsight data convert`, in the rows of MedSIGHT "
        "(`layout: parquet`). Images and masks are embedded as they were, and keep their licences.",
        *(f"## {title}\n\n{table}" for title, table in tables.items()),
        *(f"## {title}\n\n" + "\n".join(f"* {each}" for each in listed) for title, listed in
          (("Licences, as the data state them", licences), ("Sources", addresses)) if listed),
    ]  # fmt: skip
    write_text(folder / "README.md", "\n\n".join(sections).rstrip() + "\n")


def _by_split(title: str, rows: Mapping[str, Mapping[str, int]], splits: Mapping[str, int]) -> str:
    return markdown_table(
        (title, *splits), [(name, *(counts[split] for split in splits)) for name, counts in rows.items()]
    )
