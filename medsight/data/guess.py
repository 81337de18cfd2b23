"""Says which layout data have, what would be read of them, and writes their source entry: `medsight data guess`."""

import dataclasses
import inspect
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from medsight.files import write_text
from medsight.text import align, first_few

from .check import Report, count
from .picture_labels import relative_name
from .pictures import picture_name, picture_size
from .records import UntoldError
from .registry import Entry, Source, find_layout, is_address
from .sources import fitting_layouts, iterate


PREVIEW = 5  # rows that are shown
SHEET = 12  # rows kept for a contact sheet
_OF_A_STRUCTURE = 2  # of them, so that rare structures come in
_LOOKED_AT = 20  # rows, for what they leave open
UNKNOWN = "?"  # a modality, site or structure that nobody has told yet
_TO_SAY = {
    "structure": "what the masks show",
    "names": "the name of each value",
    "modality": "CT, MRI, X-Ray, ultrasound, ...",
    "site": "the part of the body: abdomen, breast, ...",
}


@dataclasses.dataclass
class Guess:
    """What `guess` found.

    Attributes:
        source: the entry, as far as it is known.
        layouts: all that fit, the chosen one first.
        reason: what the layout is, by its own description.
        shards: the files or folders that are read.
        missing: settings that the data leave open -> what to say there.
        report: what would be read, counted as by `medsight data check`, without a look into pictures.
        sizes: images by (width, height).
        rows: some rows, of each structure a few.

    Example:
        >>> Guess(Source("pairs", "scans"), ["pairs"], "Images and masks.", ["scans"], {"site": "breast, ..."}).entry()
        {'layout': 'pairs', 'path': 'scans', 'site': None}
    """

    source: Source
    layouts: list[str]
    reason: str
    shards: list[str]
    missing: dict[str, str]
    report: Report = dataclasses.field(default_factory=Report)
    sizes: Counter[tuple[int, int]] = dataclasses.field(default_factory=Counter)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def entry(self) -> dict[str, Any]:
        """The entry of a recipe, with null for what is missing."""
        entry = self.source.to_mapping()
        return {**entry, **{name: None for name in self.missing if entry.get(name, UNKNOWN) == UNKNOWN}}

    def to_yaml(self) -> str:
        """The entry as a YAML file, with a comment at what has to be filled in."""
        lines = [f"# {name}: say {hint}" for name, hint in self.missing.items()]
        return "\n".join([*lines, yaml.safe_dump(self.entry(), sort_keys=False, allow_unicode=True)])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layout": self.source.layout,
            "layouts": self.layouts,
            "reason": self.reason,
            "read": self.shards,
            "entry": self.entry(),
            "missing": self.missing,
            "sizes": {f"{width}x{height}": number for (width, height), number in self.sizes.most_common()},
            "rows": [self._shown(row) for row in self.rows[:PREVIEW]],
            **self.report.to_dict(),
        }

    def to_text(self) -> str:
        """For people: layout, counts, a few rows, and what has to be filled in."""
        others = ", ".join(self.layouts[1:])
        about = [
            ("layout", self.source.layout + (f"; it looks like {others} too (--layout)" if others else "")),
            ("which is", self.reason),
            ("read", first_few(self.shards)),
        ]
        sizes = [f"{width}x{height} ({number:,})" for (width, height), number in self.sizes.most_common()]
        parts = [align(about), self.report.to_text(), f"sizes  {first_few(sizes) or 'unknown'}"]
        if self.rows:
            shown = [self._shown(row) for row in self.rows[:PREVIEW]]
            cells = [
                [", ".join(value) if isinstance(value, list) else str(value) for value in row.values()]
                for row in shown
            ]
            parts.append(align([list(shown[0]), *cells]))
        if self.missing:
            parts.append(align([("to fill in", ""), *self.missing.items()]))
        return "\n\n".join(parts)

    def noting(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """The entries, of which sizes and some rows are kept; an image whose size cannot be read is a problem."""
        seen, others = Counter[str](), list[dict[str, Any]]()
        for entry in entries:
            if entry.row is not None:
                row = entry.row
                try:
                    self.sizes.update(map(picture_size, _images(row)))
                except (ValueError, OSError) as error:
                    yield entry._replace(row=None, error=ValueError(str(error)))
                    continue
                if any(seen[target] < _OF_A_STRUCTURE for target in row["targets"] or [""]):
                    self.rows.append(row)
                    seen.update(set(row["targets"]) or [""])
                elif len(others) < SHEET:
                    others.append(row)
            yield entry
        self.rows = [*self.rows, *others][:SHEET]

    def _shown(self, row: Mapping[str, Any]) -> dict[str, Any]:
        names = ", ".join(relative_name(picture_name(entry), self.source) for entry in _images(row))
        shown = {"image": names, "structures": list(row["targets"])}
        return {**shown, **{name: row[name] or "-" for name in ("patient", "split", "modality", "site")}}


def _images(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row["image"]] if "image" in row else row["images"]


def guess(path: str | Path, layout: str | None = None, progress: bool = False, **settings: Any) -> Guess:
    """Which layout data have, and what would be read of them.

    Args:
        path: file, folder, pattern of files, or address on the Hub.
        layout: which, where it is known; the most specific that fits by default.
        progress: whether to show a progress bar on standard error.
        settings: what is known already: fields of `Source` and settings of the layout, None where unknown.

    Raises:
        OSError, ValueError: there is nothing, or of no layout; a setting is bad.
    """
    try:
        fitting = fitting_layouts(path)
    except ValueError:
        if layout is None:
            raise
        fitting = []
    layouts = [layout, *(name for name in fitting if name != layout)] if layout else fitting
    place = str(path) if is_address(path) else os.path.abspath(path)
    given = {name: value for name, value in settings.items() if value is not None}
    entry = {"layout": layouts[0], "path": place, **given}
    assumed = dict[str, Any]()
    source = Source.from_mapping({**entry, "split": None})
    while (name := _left_open(source)) and name not in assumed:
        assumed[name] = {value: f"structure {value}" for value in range(1, 256)} if name == "names" else UNKNOWN
        source = Source.from_mapping({**entry, **assumed, "split": None})
    missing = {name: hint for name, hint in _TO_SAY.items() if name in assumed}
    found = Guess(source, layouts, _description(source.layout), find_layout(source.layout).shards(source), missing)
    bar = tqdm(iterate(source), "reading", unit="row", disable=not progress, file=sys.stderr)
    found.report = count(found.noting(bar))
    splits, targets = found.report.counts["rows"], found.report.targets
    if "names" in assumed:
        assumed["names"] = {value: name for value, name in assumed["names"].items() if name in targets} or None
    if splits and "train" not in splits:
        assumed["split"] = next(iter(splits))
    found.source = Source.from_mapping({**entry, **assumed})
    return found


def _left_open(source: Source) -> str | None:
    """The first setting that the first rows miss."""
    errors = (entry.error for entry in islice(iterate(source), _LOOKED_AT))
    return next((error.setting for error in errors if isinstance(error, UntoldError)), None)


def _description(layout: str) -> str:
    """The first paragraph of what a layout's module says."""
    text = inspect.getmodule(find_layout(layout).rows).__doc__ or "a layout of another package"
    return " ".join(text.partition("\n\n")[0].split())


def write_entry(found: Guess, file: str | Path, overwrite: bool = False) -> None:
    """Write the entry to a YAML file, which `data check`, `annotate`, `codes`, `evaluate --data` and recipes take.

    Raises:
        OSError: the file is there and may not be replaced, or cannot be written.
        ValueError: its name does not end in .yaml.
    """
    path = Path(file)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: expected the name of a .yaml file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; name another file, or add --overwrite")
    write_text(path, found.to_yaml())
