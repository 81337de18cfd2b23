"""Reads training data once and says what is wrong with it: `medsight data check`, and `check` for Python."""

import dataclasses
import hashlib
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import compress, islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from configuration_medsight.configuration_medsight import MedSightConfig
from medsight.text import align, first_few, nearest

from .additions import find_additions
from .conversations import CodeMaskError, code_images
from .groups import Groups, UnknownGroupError, match_groups
from .pictures import (
    EmptyMaskError,
    MaskSizeError,
    MaskValuesError,
    NotAPictureError,
    decode_mask,
    picture_name,
    read_picture,
)
from .registry import Entry, Source
from .sources import iterate, nothing_found


COUNTED = ("rows", "images", "patients", "masks", "absent", "conversations")
NOTES = {
    "blurred masks": "were blurred by compression or smoothing; what is above the middle of their range is inside",
    "inverted masks?": "take in all four corners and more than half of their image",
}
FEW_IMAGES = 5  # a class with fewer than so many training images is warned of
_ROWS_AT_ONCE = 256  # held in memory, with their embedded pictures


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
        counts: "rows", "images", "patients", "masks", "absent" and "conversations" by split ("image" rows and
            conversations are rows; a picture that is named twice counts once, where it has a file or name of its own).
        targets: rows by target and split.
        origins: rows by "modality / site" and split.
        files: images and masks by the ending of their file's name and split.
        pairs: modality and site of images with masks -> a file.
        problems: what must be put right before training.
        warnings: what need not.

    Example:
        >>> report = Report()
        >>> report.counts["rows"]["train"] += 2
        >>> report.ok, report.to_text().split()
        (True, ['train', 'rows', '2'])
    """

    counts: dict[str, Counter[str]] = dataclasses.field(default_factory=lambda: {name: Counter() for name in COUNTED})
    targets: dict[str, Counter[str]] = dataclasses.field(default_factory=lambda: defaultdict(Counter))
    origins: dict[str, Counter[str]] = dataclasses.field(default_factory=lambda: defaultdict(Counter))
    files: dict[str, Counter[str]] = dataclasses.field(default_factory=lambda: defaultdict(Counter))
    pairs: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    problems: list[Finding] = dataclasses.field(default_factory=list)
    warnings: list[Finding] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether training may start."""
        return not self.problems

    def compare(self, config: MedSightConfig, chosen: Groups | None = None, extend: bool = False) -> list[str]:
        """Compare with a model: pairs of modality and site that it has no code group for become problems; or, where it
        is to be extended, what would be added is returned, a line a kind.

        Args:
            config: the model's.
            chosen: groups that pairs belong to, as `match_groups` takes them.
        """
        if extend:
            targets = [target for target, counts in self.targets.items() if counts["train"] or not self._has_train]
            origins = (
                {"targets": targets, "modality": m, "site": s, "dataset": file} for (m, s), file in self.pairs.items()
            )
            try:
                return find_additions(config, origins, chosen).describe(config)
            except ValueError as error:
                self.problems.append(
                    Finding("name of a known one", next(iter(self.pairs.values()), "data"), str(error))
                )
                return []
        for pair, file in self.pairs.items() if config.use_region_codebook else ():
            try:
                match_groups(config, [pair], chosen)
            except UnknownGroupError as error:
                self.problems.append(Finding("unknown modality or site", file, f"{file}: {error}"))
        return []

    @property
    def _has_train(self) -> bool:
        return bool(self.counts["rows"]["train"])

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the attributes, each count by its name, and `ok`."""
        found = {"warnings": self.warnings, "problems": self.problems}
        return {
            "ok": self.ok,
            **self.counts,
            "targets": self.targets,
            "origins": self.origins,
            "files": self.files,
            **{name: list(map(dataclasses.asdict, findings)) for name, findings in found.items()},
        }

    def to_text(self) -> str:
        """For people: counts by split, by target and by origin, then warnings and problems, one a line."""
        lines = self._table("", {name: counts for name, counts in self.counts.items() if any(counts.values())})
        lines += self._table("rows by target", dict(sorted(self.targets.items())))
        lines += self._table("rows by modality / site", dict(sorted(self.origins.items())))
        if len(self.files) > 1:
            lines += self._table("images and masks by kind of file", dict(sorted(self.files.items())))
        for title, findings in (("warnings", self.warnings), ("problems", self.problems)):
            if findings:
                lines += ["", f"{title}: {len(findings):,}"]
                lines += [f"  {finding.kind}: {finding.message}" for finding in findings]
        return "\n".join(lines)

    def _table(self, title: str, rows: Mapping[str, Counter[str]]) -> list[str]:
        if not rows:
            return []
        splits = sorted(self.counts["rows"], key=lambda name: (["train", "validation", "test"] + [name]).index(name))
        cells = [[title, *(split.rjust(9) for split in splits)]]
        for name, counts in rows.items():
            cells.append([name, *(f"{counts[split]:,}".rjust(max(9, len(split))) for split in splits)])
        return [*([""] if title else []), align(cells)]


def check(
    sources: Sequence[Source], targets: Iterable[str] | None = None, workers: int | None = None, progress: bool = True
) -> Report:
    """Read every row, image and mask of the sources once, in parallel threads.

    Args:
        sources: what is to be trained, validated and tested on, together: splits are compared over all of them.
        targets: the structures that masks may show; any by default.
        workers: threads; by default as many as there are cores.
        progress: whether to show a progress bar on standard error.

    Returns:
        The report; bad rows, images and masks are in it as problems.

    Raises:
        OSError, ValueError: the files of a source are not there or not in its layout, or `workers` is below 1.
    """
    _look_once.cache_clear()  # files may have changed since an earlier check
    gathering = _Gathering(None if targets is None else frozenset(targets))
    found = (row for source in sources for row in gathering.rows_of(source))
    rows = iter(tqdm(found, unit="row", desc="checking", disable=not progress, file=sys.stderr))
    with ThreadPoolExecutor(os.cpu_count() if workers is None else workers) as pool:
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            for row, looks in zip(some, pool.map(look_at_pictures, some), strict=True):
                gathering.add_looks(row, looks)
    return gathering.finished()


def count(entries: Iterable[Entry]) -> Report:
    """What `check` says of rows as they come, without a look at any picture."""
    gathering = _Gathering(None)
    for entry in entries:
        gathering.add(entry)
    return gathering.finished()


class Look(NamedTuple):
    """What was seen of a picture.

    Attributes:
        name: the picture's.
        size: (width, height), of a mask that of its image; None where unknown.
        digest: of an image's pixels; None of a mask, and of a broken image.
        notes: what is to be known of a mask, kinds of `NOTES`.
        finding: what is wrong with it.
    """

    name: str
    size: tuple[int, int] | None = None
    digest: bytes | None = None
    notes: tuple[str, ...] = ()
    finding: Finding | None = None


def look_at_pictures(row: Mapping[str, Any]) -> list[Look]:
    """Looks at the images of a row and then at its masks; every one is decoded wholly."""

    def look(entry: Mapping[str, Any], *about: Any) -> Look:
        return (_look_once if entry["bytes"] is None else _look)(entry["path"], entry["bytes"], *about)

    images, owners = _images_and_owners(row)
    looks = [look(entry, "image") for entry in images]
    return looks + [look(entry, "mask", looks[owner].size) for entry, owner in zip(row["masks"], owners, strict=True)]


def _images_and_owners(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[int]]:
    """The images of a row of either kind, and for each of its masks the index of its image."""
    if "image" in row:
        return [row["image"]], [0] * len(row["masks"])
    return row["images"], code_images(row["messages"])


def _look(path: str, content: bytes | None, what: str, size: tuple[int, int] | None = None) -> Look:
    """Looks at an image; or at a mask, given its image's size if known."""
    entry = {"path": path, "bytes": content}
    name = picture_name(entry)
    try:
        if what == "mask":
            mask, blurred = decode_mask(entry, size or read_picture(entry).size)
            inverted = bool(mask[:: len(mask) - 1 or 1, :: len(mask[0]) - 1 or 1].all()) and mask.mean() > 0.5
            return Look(name, size, notes=tuple(compress(NOTES, (blurred, inverted))))
        image = read_picture(entry)
        pixels = hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes())
        return Look(name, image.size, pixels.digest())
    except (ValueError, OSError) as error:
        kinds = {
            MaskSizeError: "mask of another size",
            EmptyMaskError: "empty mask",
            MaskValuesError: "mask of several structures",
            NotAPictureError: f"{what} that is no picture",
            FileNotFoundError: f"missing {what}",
        }
        return Look(name, finding=Finding(kinds.get(type(error), f"broken {what}"), name, str(error)))


_look_once = lru_cache(maxsize=4096)(_look)  # an image, and so its masks, may be in many conversations


class _Gathering:
    """Counts rows as they pass and keeps what can only be said when all have passed."""

    def __init__(self, targets: frozenset[str] | None) -> None:
        self.report = Report()
        self.allowed = targets
        self.known_leaks: set[tuple[str, str]] = set()
        self.patients: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)  # -> split -> a file
        self.first: dict[tuple[str, str], str] = {}  # target and split -> a file
        self.pictures: set[str] = set()
        # digest of a picture -> split -> a file, and its data set and patient
        self.shown: dict[bytes, dict[str, tuple[str, tuple[str, str]]]] = defaultdict(dict)
        self.noted: dict[str, set[str]] = defaultdict(set)  # kind of a note -> masks

    def rows_of(self, source: Source) -> Iterator[dict[str, Any]]:
        """The good rows of a source, counted as they are drawn."""
        entry = None
        for entry in iterate(source):
            self.add(entry)
            if entry.row is not None:
                yield entry.row
        if entry is None:
            self.report.problems.append(Finding("no data", source.path, nothing_found(source)))

    def add(self, entry: Entry) -> None:
        """Take in a row, or what is wrong with it."""
        self.report.warnings += [Finding("not read", entry.place, warning) for warning in entry.warnings]
        if entry.row is not None:
            self._count(entry, entry.row)
            return
        kind = "codes and masks" if isinstance(entry.error, CodeMaskError) else "bad item"
        self.report.problems.append(Finding(kind, entry.place, str(entry.error)))

    def _count(self, item: Entry, row: dict[str, Any]) -> None:
        report, split = self.report, row["split"]
        images, absent = _images_and_owners(row)[0], row.get("absent")
        new = set(map(picture_name, images)) - self.pictures
        self.pictures |= new
        owner = _patient(row)
        known = not row["patient"] or split in self.patients[owner]
        counted = (1, len(new), int(not known), len(row["masks"]), len(absent or ()), int(absent is None))
        for name, count in zip(COUNTED, counted, strict=True):
            report.counts[name][split] += count
        report.origins[f"{row['modality'] or '-'} / {row['site'] or '-'}"][split] += 1
        if absent is not None and row["masks"]:
            self.report.pairs.setdefault((row["modality"], row["site"]), picture_name(row["image"]))
        for entry in (*images, *row["masks"]):
            if entry["bytes"] is None:
                report.files[Path(entry["path"]).suffix.lower()][split] += 1
        for target, file in zip(row["targets"], map(picture_name, row["masks"]), strict=True):
            if target:
                self.first.setdefault((target, split), file)
            if target and self.allowed is not None and target not in self.allowed:
                problem = f"is none of the {len(self.allowed)} targets: {nearest(target, self.allowed)}"
                report.problems.append(Finding("unknown target", file, f"{file}: {target!r} {problem}"))
        for target in sorted({*row["targets"]} - {""}):
            report.targets[target][split] += 1
        if row["patient"]:
            self.patients[owner].setdefault(split, picture_name(images[0]) if images else item.place)
            if item.known_leak:
                self.known_leaks.add(owner)

    def add_looks(self, row: Mapping[str, Any], looks: Iterable[Look]) -> None:
        """Take in what was seen of a row's pictures."""
        for look in looks:
            if look.finding is not None:
                self.report.problems.append(look.finding)
            if look.digest is not None:
                self.shown[look.digest].setdefault(row["split"], (look.name, _patient(row)))
            for note in look.notes:
                self.noted[note].add(look.name)

    def finished(self) -> Report:
        """The report, with what follows from all rows together."""
        report = self.report
        report.problems = list(dict.fromkeys(report.problems))
        self._compare_splits()
        for note, names in sorted((note, sorted(masks)) for note, masks in self.noted.items()):
            message = f"{len(names):,} mask(s) {NOTES[note]} ({first_few(names)})"
            report.warnings.append(Finding(note, names[0], message))
        if self.allowed is None and any(split == "train" for _, split in self.first):
            for (target, split), file in sorted(self.first.items()):
                if (target, "train") not in self.first:
                    message = f"{file}: {target!r} has masks in the split {split}, none in train"
                    report.problems.append(Finding("unknown target", file, message))
        for target, counts in sorted(report.targets.items()):
            if 0 < counts["train"] < FEW_IMAGES:
                message = f"{target!r} is in {counts['train']} training image(s)"
                report.warnings.append(Finding("few images", self.first[target, "train"], message))
        return report

    def _compare_splits(self) -> None:
        """Patients and pictures in several splits: a problem, but a warning where the data set itself says so."""
        known: dict[str, list[str]] = defaultdict(list)
        for (dataset, patient), files in self.patients.items():
            if len(files) > 1 and (dataset, patient) in self.known_leaks:
                known[dataset].append(patient)
            elif len(files) > 1:
                where = "; ".join(f"{split}: {file}" for split, file in sorted(files.items()))
                message = f"{patient} is in {len(files)} splits of {dataset} ({where})"
                self.report.problems.append(Finding("leaking patient", next(iter(files.values())), message))
        for places in self.shown.values():
            patients = {patient for _, patient in places.values()}
            of_one = len(patients) == 1 and all(patient for _, patient in patients)  # told above
            if len(places) > 1 and not of_one and not patients & self.known_leaks:
                where = "; ".join(f"{split}: {file}" for split, (file, _) in sorted(places.items()))
                message = f"the same picture is in {len(places)} splits ({where})"
                file = next(iter(places.values()))[0]
                self.report.problems.append(Finding("picture in several splits", file, message))
        for dataset, leaks in sorted(known.items()):
            message = (
                f"{dataset}: {len(leaks):,} patient(s) or image(s) are in several splits, as the data set itself "
                f"says ({first_few(sorted(leaks))}): a score on them is flattered"
            )
            self.report.warnings.append(Finding("known leak", dataset, message))


def _patient(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["dataset"] or "", row["patient"] or ""


def parse_condition(text: str) -> tuple[str, Any]:
    """Field and value of FIELD=VALUE; the value is JSON (true, 3, "text"), or else text as it stands.

    Raises:
        ValueError: there is no "=" or no field.
    """
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ValueError(f"--where {text!r}: expected FIELD=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
