"""What an annotation leaves behind: parquet shards of conversations, their counts as JSON, and a data card."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from medsight.data.schema import CONVERSATION_FEATURES
from medsight.files import write_json, write_text


ROW_GROUP_ROWS = 1_000
ROW_GROUP_BYTES = 64 * 2**20  # of embedded pictures; what is held in memory before it is written
SHARD_BYTES = 512 * 2**20


class SplitWriter:
    """Writes the conversations of a split as SPLIT-00000.parquet, SPLIT-00001.parquet, and so on.

    At most one row group is held in memory.

    Args:
        folder: exists; the shards go there.
        split: of the rows of `CONVERSATION_FEATURES` that it is given.

    Raises:
        ValueError: the split cannot be part of a file name.
    """

    def __init__(self, folder: Path, split: str) -> None:
        if not split.isidentifier():
            raise ValueError(f"split {split!r}: expected a word, since it names files")
        self.folder, self.split = folder, split
        self.rows: list[Mapping[str, Any]] = []
        self.held_bytes = self.shard_bytes = self.shards = 0
        self.file: Any = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        self.rows.append(row)
        self.held_bytes += sum(len(entry["bytes"] or b"") for entry in (*row["images"], *row["masks"]))
        if len(self.rows) >= ROW_GROUP_ROWS or self.held_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is held."""
        if self.rows:
            self._flush()
        if self.file is not None:
            self.file.close()

    def _flush(self) -> None:
        schema = CONVERSATION_FEATURES.arrow_schema
        if self.file is None or self.shard_bytes >= SHARD_BYTES:
            if self.file is not None:
                self.file.close()
            self.file = pyarrow.parquet.ParquetWriter(self.folder / f"{self.split}-{self.shards:05d}.parquet", schema)
            self.shards, self.shard_bytes = self.shards + 1, 0
        self.file.write_table(pyarrow.Table.from_pylist(self.rows, schema=schema))
        self.shard_bytes += self.held_bytes
        self.rows, self.held_bytes = [], 0


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
    intents: Counter[str] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    datasets: Counter[str] = field(default_factory=Counter)
    absent: Counter[str] = field(default_factory=Counter)
    codes: dict[str, list[int]] = field(default_factory=dict)
    masks_beyond_queries: int = 0
    not_asked: Counter[str] = field(default_factory=Counter)

    def code_usage(self) -> dict[str, dict[str, float]]:
        """For each group with masks: masks, codes in use, codes there are, and the perplexity of their use."""
        usage = {}
        for group, counts in self.codes.items():
            if sum(counts):
                shares = np.array([count for count in counts if count]) / sum(counts)
                usage[group] = {
                    "masks": sum(counts),
                    "used": len(shares),
                    "codes": len(counts),
                    "perplexity": round(float(np.exp(-(shares * np.log(shares)).sum())), 2),
                }
        return usage

    def to_dict(self) -> dict[str, Any]:
        """For JSON, tables in alphabetical order."""
        tables = {name: dict(sorted(v.items())) if isinstance(v, Counter) else v for name, v in vars(self).items()}
        return {**tables, "code_usage": self.code_usage()}


def summary(counts: AnnotationCounts) -> str:
    """A table of what was made, for a terminal."""
    lines = [f"{counts.images} images, {counts.conversations} conversations", ""]
    lines += [f"{name:<24}{count:>8}" for name, count in sorted(counts.intents.items())]
    lines += ["", f"{'group':<24}{'masks':>8}{'codes in use':>14}{'perplexity':>12}"]
    for name, usage in counts.code_usage().items():
        used = f"{usage['used']} of {usage['codes']}"
        lines.append(f"{name:<24}{usage['masks']:>8}{used:>14}{usage['perplexity']:>12}")
    if counts.masks_beyond_queries:
        lines.append(f"\n{counts.masks_beyond_queries} masks beyond the number of region queries of their image")
    if counts.skipped:
        lines.append(f"\n{len(counts.skipped)} images left out, each named in README.md")
    return "\n".join(lines)


def write_card(folder: Path, counts: AnnotationCounts, provenance: Mapping[str, Any]) -> None:
    """Write README.md, a card that `datasets` and the Hub read, and annotation.json with the same.

    Args:
        provenance: what made it: settings, model, hashes, versions.
    """
    write_json(folder / "annotation.json", {"provenance": dict(provenance), "counts": counts.to_dict()})
    front = ["---", "task_categories:", "- image-text-to-text", "configs:", "- config_name: default", "  data_files:"]
    front += [f"  - split: {split}\n    path: {split}-*.parquet" for split in sorted(counts.splits)]
    usage = counts.code_usage()
    in_use = [(name, u["masks"], f"{u['used']} of {u['codes']}", u["perplexity"]) for name, u in usage.items()]
    tables = {
        "By split": _table(("split", "conversations"), counts.splits.items()),
        "By intent": _table(("intent", "conversations"), counts.intents.items()),
        "By group": _table(("group", "conversations"), counts.groups.items()),
        "By data set": _table(("data set", "conversations"), counts.datasets.items()),
        "Codes in use": _table(("group", "masks", "codes in use", "perplexity"), in_use)
        + f"\n\nMasks beyond the number of region queries of their image: {counts.masks_beyond_queries}.",
        "Said to be absent": _table(("structure", "conversations"), counts.absent.items()),
        "Left out": _table(("structure with too many masks for one answer", "images"), counts.not_asked.items())
        + f"\n\nImages that could not be read: {len(counts.skipped)}.\n"
        + "".join(f"\n* {reason}" for reason in counts.skipped),
    }
    sections = [
        "\n".join([*front, "---"]),
        "# Grounded conversations",
        f"{counts.conversations} conversations about {counts.images} images, written by `medsight data annotate` from "
        "masks: each mask has the region code of the query that the model matched it with. The texts come from "
        "templates and say no more than the data's own rows do. Images and masks keep their licences. Not for "
        "clinical use.",
        _table(("made by", ""), [(name, f"`{value}`") for name, value in provenance.items()]),
        *(f"## {title}\n\n{table}" for title, table in tables.items()),
    ]
    write_text(folder / "README.md", "\n\n".join(sections).rstrip() + "\n")


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """A Markdown table, its rows in alphabetical order."""
    lines = [head, ("---",) * len(head), *sorted(rows)]
    cells = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join(cells) if len(cells) > 2 else "None."
