"""What an annotation leaves behind: parquet shards of conversations, their counts as JSON, and a data card."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medsight.data.shards import card_front, markdown_table
from medsight.files import write_json, write_text


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
    usage = counts.code_usage()
    in_use = [(name, u["masks"], f"{u['used']} of {u['codes']}", u["perplexity"]) for name, u in usage.items()]
    tables = {
        "By split": markdown_table(("split", "conversations"), counts.splits.items()),
        "By intent": markdown_table(("intent", "conversations"), counts.intents.items()),
        "By group": markdown_table(("group", "conversations"), counts.groups.items()),
        "By data set": markdown_table(("data set", "conversations"), counts.datasets.items()),
        "Codes in use": markdown_table(("group", "masks", "codes in use", "perplexity"), in_use)
        + f"\n\nMasks beyond the number of region queries of their image: {counts.masks_beyond_queries}.",
        "Said to be absent": markdown_table(("structure", "conversations"), counts.absent.items()),
        "Left out": markdown_table(
            ("structure with too many masks for one answer", "images"), counts.not_asked.items()
        )
        + f"\n\nImages that could not be read: {len(counts.skipped)}.\n"
        + "".join(f"\n* {reason}" for reason in counts.skipped),
    }
    sections = [
        card_front(counts.splits, "image-text-to-text"),
        "# Grounded conversations",
        f"{counts.conversations} conversations about {counts.images} images, written by `medsight data annotate` from "
        "masks: each mask has the region code of the query that the model matched it with. The texts come from "
        "templates and say no more than the data's own rows do. Images and masks keep their licences. Not for "
        "clinical use.",
        markdown_table(("made by", ""), [(name, f"`{value}`") for name, value in provenance.items()]),
        *(f"## {title}\n\n{table}" for title, table in tables.items()),
    ]
    write_text(folder / "README.md", "\n\n".join(sections).rstrip() + "\n")
