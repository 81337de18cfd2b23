"""What an annotation leaves behind: parquet shards of conversations, their counts as JSON, and a data card."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from medsight.data.schema import CONVERSATION_FEATURES


ROW_GROUP_ROWS = 1_000
ROW_GROUP_BYTES = 64 * 2**20  # of embedded pictures; what is held in memory before it is written
SHARD_BYTES = 512 * 2**20


class ConversationWriter:
    """Writes rows of `CONVERSATION_FEATURES` as SPLIT-00000-of-00003.parquet; a shard has its name once it is whole.

    At most one row group of a split is held in memory.

    Args:
        folder: exists; the shards go there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._splits: dict[str, _Split] = {}

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row to the shards of its split.

        Raises:
            ValueError: the split cannot be part of a file name.
            OSError: the disk is full, or the folder went away.
        """
        name = row["split"]
        if name not in self._splits:
            if not name.isidentifier():
                raise ValueError(f"split {name!r}: expected a word, since it names files")
            self._splits[name] = _Split(self.folder, name)
        self._splits[name].write(row)

    def finish(self) -> list[Path]:
        """Write what is held and give every shard its name; returns the shards."""
        return [path for split in self._splits.values() for path in split.finish()]

    def close(self) -> None:
        """Close open files; may be called at any time, also after a failure."""
        for split in self._splits.values():
            split.close()


class _Split:
    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.rows: list[Mapping[str, Any]] = []
        self.held_bytes = self.shard_bytes = self.shards = 0
        self.file: Any = None

    def write(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)
        self.held_bytes += sum(len(entry["bytes"] or b"") for entry in (*row["images"], *row["masks"]))
        if len(self.rows) >= ROW_GROUP_ROWS or self.held_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def finish(self) -> list[Path]:
        self._flush()
        self.close()
        paths = []
        for number in range(self.shards):
            paths.append(self.folder / f"{self.name}-{number:05d}-of-{self.shards:05d}.parquet")
            os.replace(self._unfinished(number), paths[-1])
        return paths

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _unfinished(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:05d}.unfinished"

    def _flush(self) -> None:
        if not self.rows:
            return
        schema = CONVERSATION_FEATURES.arrow_schema
        if self.file is None:
            self.file = pyarrow.parquet.ParquetWriter(self._unfinished(self.shards), schema)
            self.shards, self.shard_bytes = self.shards + 1, 0
        self.file.write_table(pyarrow.Table.from_pylist(self.rows, schema=schema))
        self.shard_bytes += self.held_bytes
        self.rows, self.held_bytes = [], 0
        if self.shard_bytes >= SHARD_BYTES:
            self.close()


@dataclass
class AnnotationCounts:
    """What an annotation made.

    Attributes:
        images, conversations: how many went in and came out.
        skipped: why, for each image that was left out.
        intents, groups, splits, datasets: conversations by each of these.
        absent: how often each structure was said to be absent.
        codes: for each code group, how many masks got each of its codes; each mask counts once.
        masks_beyond_queries: masks of images with more masks than region queries, which got the code of the query that
            overlaps them most.
        not_asked: targets with more masks in an image than an answer may cite, and in how many images.
    """

    images: int = 0
    conversations: int = 0
    skipped: list[str] = field(default_factory=list)
    intents: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    datasets: dict[str, int] = field(default_factory=dict)
    absent: dict[str, int] = field(default_factory=dict)
    codes: dict[str, list[int]] = field(default_factory=dict)
    masks_beyond_queries: int = 0
    not_asked: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        """Count one more of `name` in the table `kind`."""
        table = getattr(self, kind)
        table[name] = table.get(name, 0) + 1

    def code_usage(self) -> dict[str, dict[str, float]]:
        """For each group with masks: masks, codes in use, codes there are, and the perplexity of their use."""
        usage = {}
        for group, counts in self.codes.items():
            if sum(counts):
                shares = np.array([count for count in counts if count]) / sum(counts)
                perplexity = float(np.exp(-(shares * np.log(shares)).sum()))
                usage[group] = {
                    "masks": sum(counts),
                    "used": len(shares),
                    "codes": len(counts),
                    "perplexity": round(perplexity, 2),
                }
        return usage

    def to_dict(self) -> dict[str, Any]:
        """For JSON, tables in alphabetical order."""
        tables = {name: value for name, value in vars(self).items() if name != "codes"}
        tables = {name: dict(sorted(v.items())) if isinstance(v, dict) else v for name, v in tables.items()}
        return {**tables, "code_usage": self.code_usage(), "codes": self.codes}


def write_card(folder: Path, counts: AnnotationCounts, provenance: Mapping[str, Any]) -> None:
    """Write README.md, a card that `datasets` and the Hub read, and annotation.json with the same.

    Args:
        provenance: what made it: settings, model, hashes, versions.
    """
    content = {"provenance": dict(provenance), "counts": counts.to_dict()}
    (folder / "annotation.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    files = [f"  - split: {split}\n    path: {split}-*.parquet" for split in sorted(counts.splits)]
    front = "\n".join(["---", "task_categories:", "- image-text-to-text", "configs:", "- config_name: default"])
    front += "\n" + "\n".join(["  data_files:", *files]) + "\n---" if files else "\n---"
    usage = counts.code_usage()
    sections = [
        front,
        "# Grounded conversations",
        f"{counts.conversations} conversations about {counts.images} images, written by `medsight data annotate` from "
        "masks: each mask has the region code of the query that the model matched it with. The texts come from "
        "templates and say no more than the data's own rows do. Images and masks keep their licences. Not for "
        "clinical use.",
        _table(("made by", ""), [(name, f"`{value}`") for name, value in provenance.items()]),
        *(
            f"## By {title}\n\n" + _table((title, "conversations"), sorted(getattr(counts, name).items()))
            for name, title in (
                ("splits", "split"),
                ("intents", "intent"),
                ("groups", "group"),
                ("datasets", "data set"),
            )
        ),
        "## Codes in use\n\n"
        + _table(
            ("group", "masks", "codes in use", "perplexity"),
            [(name, u["masks"], f"{u['used']} of {u['codes']}", u["perplexity"]) for name, u in usage.items()],
        )
        + f"\n\nMasks beyond the number of region queries of their image: {counts.masks_beyond_queries}.",
        "## Said to be absent\n\n" + _table(("structure", "conversations"), sorted(counts.absent.items())),
        "## Left out\n\n"
        + _table(
            ("structure with too many masks for one answer", "images"),
            sorted(counts.not_asked.items()),
        )
        + f"\n\nImages that could not be read: {len(counts.skipped)}.\n"
        + "".join(f"\n* {reason}" for reason in counts.skipped),
    ]
    (folder / "README.md").write_text("\n\n".join(sections).rstrip() + "\n", encoding="utf-8")


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    if not rows:
        return "None."
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
