"""Rows written as parquet shards, and the card beside them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Features

from .schema import CONVERSATION_FEATURES


ROW_GROUP_ROWS = 1_000
ROW_GROUP_BYTES = 64 * 2**20  # of embedded pictures; what is held in memory before it is written
SHARD_BYTES = 512 * 2**20


class SplitWriter:
    """Writes the rows of a split as SPLIT-00000.parquet, SPLIT-00001.parquet, and so on.

    At most one row group is held in memory.

    Args:
        folder: exists; the shards go there.
        split: of the rows that it is given.
        features: of the rows.

    Raises:
        ValueError: the split cannot be part of a file name.

    Example:
        >>> SplitWriter(Path("folder"), "train").shards
        0
    """

    def __init__(self, folder: Path, split: str, features: Features = CONVERSATION_FEATURES) -> None:
        if not split.isidentifier():
            raise ValueError(f"split {split!r}: expected a word, since it names files")
        self.folder, self.split, self.schema = folder, split, features.arrow_schema
        self.rows: list[Mapping[str, Any]] = []
        self.held_bytes = self.shard_bytes = self.shards = 0
        self.file: Any = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        self.rows.append(row)
        self.held_bytes += sum(len(entry["bytes"] or b"") for entry in pictures_of(row))
        if len(self.rows) >= ROW_GROUP_ROWS or self.held_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is held."""
        if self.rows:
            self._flush()
        if self.file is not None:
            self.file.close()

    def _flush(self) -> None:
        if self.file is None or self.shard_bytes >= SHARD_BYTES:
            if self.file is not None:
                self.file.close()
            self.file = pyarrow.parquet.ParquetWriter(
                self.folder / f"{self.split}-{self.shards:05d}.parquet", self.schema
            )
            self.shards, self.shard_bytes = self.shards + 1, 0
        self.file.write_table(pyarrow.Table.from_pylist(self.rows, schema=self.schema))
        self.shard_bytes += self.held_bytes
        self.rows, self.held_bytes = [], 0


def pictures_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All images and masks of a row of either kind."""
    return [*([row["image"]] if "image" in row else row["images"]), *row["masks"]]


def card_front(splits: Iterable[str], task: str) -> str:
    """The first lines of a README.md, by which `datasets` and the Hub find each split's shards."""
    lines = ["---", "task_categories:", f"- {task}", "configs:", "- config_name: default", "  data_files:"]
    lines += [f"  - split: {split}\n    path: {split}-*.parquet" for split in sorted(splits)]
    return "\n".join([*lines, "---"])


def markdown_table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """A Markdown table, its rows in alphabetical order."""
    lines = [head, ("---",) * len(head), *sorted(rows)]
    cells = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join(cells) if len(cells) > 2 else "None."
