"""What a check of training data found: counts, warnings and problems, as text or as JSON."""

import dataclasses
from collections import Counter, defaultdict
from typing import Any

from medsight.text import align


COUNTED = ("rows", "images", "masks", "absent", "conversations")
TABLES = ("targets", "origins")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or to be known of.

    Attributes:
        kind: what sort of thing, e.g. "broken image"; the kinds are few and fixed.
        file: the file (and item) at fault.
        message: what was expected and what came.

    Example:
        >>> Finding("missing mask", "a.png", "a.png: no such image file").kind
        'missing mask'
    """

    kind: str
    file: str
    message: str


@dataclasses.dataclass
class Report:
    """What `check` found.

    Attributes:
        rows, images, masks, absent, conversations: counts by split ("image" rows and conversations are rows; `images`
            counts the pictures that they name, one that is named twice once, where it has a file or name of its own).
        targets: rows by target and split.
        origins: rows by "modality / site" and split.
        problems: what must be put right before training.
        warnings: what need not.

    Example:
        >>> report = Report()
        >>> report.rows["train"] += 2
        >>> report.ok, report.to_text().split()
        (True, ['train', 'rows', '2'])
    """

    rows: Counter[str] = dataclasses.field(default_factory=Counter)
    images: Counter[str] = dataclasses.field(default_factory=Counter)
    masks: Counter[str] = dataclasses.field(default_factory=Counter)
    absent: Counter[str] = dataclasses.field(default_factory=Counter)
    conversations: Counter[str] = dataclasses.field(default_factory=Counter)
    targets: dict[str, Counter[str]] = dataclasses.field(default_factory=lambda: defaultdict(Counter))
    origins: dict[str, Counter[str]] = dataclasses.field(default_factory=lambda: defaultdict(Counter))
    problems: list[Finding] = dataclasses.field(default_factory=list)
    warnings: list[Finding] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether training may start."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the attributes, and `ok`."""
        counted = {name: dict(getattr(self, name)) for name in COUNTED}
        tables = {name: {key: dict(value) for key, value in getattr(self, name).items()} for name in TABLES}
        found = {
            name: [dataclasses.asdict(finding) for finding in getattr(self, name)] for name in ("warnings", "problems")
        }
        return {"ok": self.ok, **counted, **tables, **found}

    def to_text(self) -> str:
        """For people: counts by split, by target and by origin, then warnings and problems, one a line."""
        splits = sorted(self.rows, key=lambda name: (["train", "validation", "test"] + [name]).index(name))
        lines = _table(
            "", splits, {name: getattr(self, name) for name in COUNTED if any(getattr(self, name).values())}
        )
        lines += _table("rows by target", splits, self.targets)
        lines += _table("rows by modality / site", splits, self.origins)
        for title, findings in (("warnings", self.warnings), ("problems", self.problems)):
            if findings:
                lines += [
                    "",
                    f"{title}: {len(findings):,}",
                    *(f"  {found.kind}: {found.message}" for found in findings),
                ]
        return "\n".join(lines)


def _table(title: str, splits: list[str], rows: dict[str, Counter[str]]) -> list[str]:
    if not rows:
        return []
    cells = [[title, *(split.rjust(9) for split in splits)]]
    cells += [
        [name, *(f"{counts[split]:,}".rjust(max(9, len(split))) for split in splits)]
        for name, counts in (sorted(rows.items()) if title else rows.items())
    ]
    return [*([""] if title else []), align(cells)]
