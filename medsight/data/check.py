"""Reads training data once and says what is wrong with it: `medsight data check`, and `check` for Python."""

import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from medsight.text import first_few, nearest

from .conversations import CodeMaskError, code_images
from .inspection import Job, inspect_in_parallel
from .pictures import picture_name
from .registry import Entry, Source, find_layout
from .report import Finding, Report
from .sources import iterate, nothing_found


FEW_IMAGES = 5  # a class with fewer than so many training images is warned of
_ROWS_PER_PROCESS = 5000  # starting a process takes as long as reading about so many small pictures


def check(
    sources: Sequence[Source],
    targets: Iterable[str] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Read every row, image and mask of the sources once, in parallel processes.

    Args:
        sources: what is to be trained, validated and tested on, together: splits are compared over all of them.
        targets: the structures that masks may show; any by default.
        workers: processes; by default as many as there are cores, fewer for small data; 1 reads in this process.
        progress: whether to show a progress bar on standard error.

    Returns:
        The report; bad rows, images and masks are in it as problems.

    Raises:
        OSError, ValueError: the files of a source are not there or not in its layout, or `workers` is below 1.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers {workers}: expected at least 1")
    total = sum(_count(source) for source in sources)
    if workers is None:
        workers = min(os.cpu_count() or 1, 1 + total // _ROWS_PER_PROCESS)
    gathering = _Gathering(None if targets is None else frozenset(targets))
    with tqdm(total=total or None, unit="row", desc="checking", disable=not progress, file=sys.stderr) as bar:
        jobs = (job for source in sources for job in gathering.jobs(source, bar))
        for findings in inspect_in_parallel(jobs, workers):
            gathering.report.problems.extend(findings)
    return gathering.finished()


def _count(source: Source) -> int:
    """How many rows there will be; 0 where counting would mean reading the pictures."""
    shards = find_layout(source.layout).shards(source)
    if any(not shard.endswith((".json", ".jsonl")) and not os.path.isdir(shard) for shard in shards):
        return 0
    return sum(1 for _ in iterate(source))


class _Gathering:
    """Counts rows as they pass and keeps what can only be said when all have passed."""

    def __init__(self, targets: frozenset[str] | None) -> None:
        self.report = Report()
        self.allowed = targets
        self.known_leaks: set[tuple[str, str]] = set()
        self.patients: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)  # -> split -> a file
        self.first: dict[tuple[str, str], str] = {}  # target and split -> a file
        self.bare: Counter[str] = Counter()  # by data set, images with neither a mask nor an absent structure
        self.pictures: set[str] = set()

    def jobs(self, source: Source, bar: Any) -> Iterator[Job]:
        """Counts the rows of a source as they are drawn; the pictures that are to be read."""
        entry = None
        for entry in iterate(source):
            bar.update()
            if entry.row is not None:
                yield self._count(entry, entry.row)
                continue
            kind = "codes and masks" if isinstance(entry.error, CodeMaskError) else "bad item"
            self.report.problems.append(Finding(kind, entry.place, str(entry.error)))
        if entry is None:
            self.report.problems.append(Finding("no data", source.path, nothing_found(source)))

    def _count(self, entry: Entry, row: dict[str, Any]) -> Job:
        report, split = self.report, row["split"]
        regions = "image" in row
        images = [row["image"]] if regions else row["images"]
        owners = [0] * len(row["masks"]) if regions else code_images(row["messages"])
        report.rows[split] += 1
        report.conversations[split] += not regions
        report.masks[split] += len(row["masks"])
        for name in map(picture_name, images):
            if name not in self.pictures:
                self.pictures.add(name)
                report.images[split] += 1
        if regions:
            report.absent[split] += len(row["absent"])
            if not row["masks"] and not row["absent"]:
                self.bare[row["dataset"]] += 1
        report.origins[f"{row['modality'] or '-'} / {row['site'] or '-'}"][split] += 1
        for target, mask in zip(row["targets"], row["masks"], strict=True):
            self._target(target, split, picture_name(mask))
        for target in set(row["targets"]) - {""}:
            report.targets[target][split] += 1
        if row["patient"]:
            key = (row["dataset"] or "", row["patient"])
            self.patients[key].setdefault(split, picture_name(images[0]) if images else entry.place)
            if entry.known_leak:
                self.known_leaks.add(key)
        return Job(images, row["masks"], owners)

    def _target(self, target: str, split: str, file: str) -> None:
        if not target:
            return
        self.first.setdefault((target, split), file)
        if self.allowed is not None and target not in self.allowed:
            message = f"{file}: {target!r} is none of the {len(self.allowed)} targets: {nearest(target, self.allowed)}"
            self.report.problems.append(Finding("unknown target", file, message))

    def finished(self) -> Report:
        """The report, with what follows from all rows together."""
        report = self.report
        report.problems = list(dict.fromkeys(report.problems))
        leaks: dict[str, list[str]] = defaultdict(list)
        for (dataset, patient), files in self.patients.items():
            if len(files) < 2:
                continue
            if (dataset, patient) in self.known_leaks:
                leaks[dataset].append(patient)
                continue
            where = "; ".join(f"{split}: {file}" for split, file in sorted(files.items()))
            message = f"{patient} is in {len(files)} splits of {dataset} ({where})"
            report.problems.append(Finding("leaking patient", next(iter(files.values())), message))
        for dataset, patients in sorted(leaks.items()):
            message = (
                f"{dataset}: {len(patients):,} patient(s) or image(s) are in several splits, as the data set itself "
                f"says ({first_few(sorted(patients))}): a score on them is flattered"
            )
            report.warnings.append(Finding("known leak", dataset, message))
        if self.allowed is None and any(split == "train" for _, split in self.first):
            for (target, split), file in sorted(self.first.items()):
                if (target, "train") not in self.first:
                    message = f"{file}: {target!r} has masks in the split {split}, none in train"
                    report.problems.append(Finding("unknown target", file, message))
        for target, counts in sorted(report.targets.items()):
            if 0 < counts["train"] < FEW_IMAGES:
                message = f"{target!r} is in {counts['train']} training image(s)"
                report.warnings.append(Finding("few images", self.first[target, "train"], message))
        for dataset, count in sorted(self.bare.items()):
            message = f"{dataset}: {count:,} image(s) with neither a mask nor a structure said to be absent"
            report.warnings.append(Finding("no mask", dataset, message))
        return report


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
