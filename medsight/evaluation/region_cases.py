"""Images with masks as cases: what is asked of each follows from the benchmark's intent."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsight.data import wording
from medsight.data.groups import Groups
from medsight.data.pictures import read_mask, read_picture
from medsight.data.sources import Source, detect_layout, find_layout, find_source, iterate, kind_of
from medsight.data.templates import matches

from .benchmarks import Benchmark
from .cases import CLOSED, OPEN, Case, Words, origin_of, relative, wordings


Row = Mapping[str, Any]
MOST_NAMED = 4  # structures in one question


@dataclass(frozen=True)
class Asked:
    """One question about a row of `REGION_FEATURES`."""

    target: str | None = None  # what it is about: one structure, or several in words
    masks: tuple[int, ...] = ()  # of the reference, as indices into the row's
    named: bool = False  # whether the masks are of several structures, told apart by name
    key: str = ""  # what the case's id says after the image's
    answer: str | None = None
    answer_type: str | None = None
    options: tuple[str, ...] = ()  # all that the right answer can be


class Present:
    """What all images of a benchmark show, by modality and site: so that what is absent from one can be told."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._groups = Groups.of_pairs([(row["modality"], row["site"]) for row in rows])
        vocabulary = wording.Vocabulary.from_rows(rows, self._groups)
        self._elsewhere = [vocabulary.unrelated_targets(group, wordings()) for group in range(len(self._groups.names))]

    def absent(self, row: Row, count: int, chance: random.Random) -> list[str]:
        """Structures that are not in the row's image: all that it lists, and up to `count` that only images of
        unrelated groups show, drawn from one such group after the other."""
        groups = [list(targets) for targets in self._elsewhere[self._groups.index(row["modality"], row["site"])]]
        drawn: list[str] = []
        for targets in groups:
            chance.shuffle(targets)
        chance.shuffle(groups)
        while len(drawn) < count and any(groups):
            drawn += [targets.pop() for targets in groups if targets]
        return list(dict.fromkeys([*row["absent"], *drawn[:count]]))


@dataclass(frozen=True)
class Diagnosis:
    """What an image's row says of its diagnosis.

    Example:
        >>> diagnosis_of({"targets": ["liver", "liver tumor"], "finding": None})
        Diagnosis(answer='liver tumor', targets=('liver tumor',), masks=(1,))
    """

    answer: str
    targets: tuple[str, ...]  # the structures that show it
    masks: tuple[int, ...]  # of these, as indices into the row's


def diagnosis_of(row: Mapping[str, Any], finding: str | None = None) -> Diagnosis | None:
    """The diagnosis of a row of `REGION_FEATURES`; None where it has none to ask for.

    With a finding, its masks are those of the structures that name it, else of abnormal ones, else of the only one;
    a normal finding has none. Without a finding, structures that are abnormal by their names are the diagnosis.
    A finding from a table of diagnoses takes the place of the row's own.
    """
    finding = finding or row.get("finding")
    targets = list(dict.fromkeys(row["targets"]))
    findings = wordings().findings
    if finding and matches(finding, findings["normal"]):
        return Diagnosis(finding, (), ())
    signs = wording.signs_of(finding, targets, findings["abnormal"], only=len(targets) == 1)
    answer = finding or " and ".join(signs)
    if finding and len(signs) == 1 and wording.names_finding(signs[0], finding):
        answer = signs[0]
    if not answer:
        return None
    masks = tuple(index for index, target in enumerate(row["targets"]) if target in signs)
    return Diagnosis(answer, tuple(signs), masks)


def source_of(benchmark: Benchmark, path: Path) -> Source:
    """The data that a benchmark is asked on: in its own layout, or for images with masks in any that has them.

    Raises:
        OSError, ValueError: the data is not there, or in no layout that the benchmark can read.
    """
    own = Source(benchmark.layout, str(path), split=benchmark.split)
    if find_layout(own.layout).kind != "regions":
        benchmark.files_in(path)
        return own
    try:
        if path.suffix not in (".yaml", ".yml"):
            benchmark.files_in(path)
            return own
    except FileNotFoundError as error:
        if not path.exists():
            raise
        try:
            detect_layout(path)
        except ValueError:
            raise error from None
    source = find_source(path, split=benchmark.split)
    if kind_of(source) != "regions":
        raise ValueError(f"{path}: layout {source.layout} holds conversations; {benchmark.name} asks about masks")
    return source


def region_cases(benchmark: Benchmark, source: Source, words: Words) -> Iterator[Case]:
    """What the benchmark's intent asks of each image of its split, in the order of the files."""
    path, rows = Path(source.path), [entry.checked() for entry in iterate(source)]
    intent, present = benchmark.chosen_intent(), Present(rows)
    kinds = tuple(sorted({answer for row in rows if (answer := _kind(intent, row))} | _shipped_kinds(intent)))
    for row in rows:
        image = relative(row["image"]["path"], path)
        for asked in _asked(intent, row, present, kinds, random.Random(image)):
            identity, target = image + asked.key, asked.target or ""
            named = {"target": target, "targets": target, "a_target": wording.with_article(target)}
            sizes = {tuple(row["spacing_mm"][mask] or ()) for mask in asked.masks}
            yield Case(
                id=identity,
                prompt=words.prompt(identity, {**named, **wording.picture_words(row, wordings())}),
                images=(row["image"],),
                answer=asked.answer,
                answer_type=asked.answer_type,
                options=asked.options,
                target=asked.target,
                absent=benchmark.has_masks and not asked.masks,
                masks=tuple(row["masks"][mask] for mask in asked.masks),
                mask_targets=tuple(row["targets"][mask] for mask in asked.masks) if asked.named else (),
                spacing_mm=(sizes.pop() or None) if len(sizes) == 1 else None,
                **origin_of(row),
            )


def _kind(intent: str, row: Row) -> str:
    """A row's modality in words, or its site."""
    return (row["site"] or "") if intent == "site" else wordings().modality(row["modality"])


def _shipped_kinds(intent: str) -> set[str]:
    """The modalities that wordings know, so that a kind of MRI that no row shows is another one than MRI."""
    return {words for words in wordings().modalities.values() if "{" not in words} if intent == "modality" else set()


def _asked(intent: str, row: Row, present: Present, kinds: tuple[str, ...], chance: random.Random) -> Iterator[Asked]:
    """The questions of an intent about one row, in its order of structures."""
    targets = list(dict.fromkeys(row["targets"]))
    if intent == "segment_one":
        for target in [*targets, *row["absent"]]:
            yield Asked(target, _masks_of(row, [target]), key=f"#{target}")
    elif intent == "segment_several":
        if len(targets) > 1:
            chosen = chance.sample(sorted(targets), chance.randint(2, min(MOST_NAMED, len(targets))))
            yield Asked(wording.enumerate_words(chosen), _masks_of(row, chosen), named=True)
    elif intent == "segment_all":
        if targets:
            yield Asked(wording.enumerate_words(sorted(targets)), _masks_of(row, sorted(targets)), named=True)
    elif intent == "diagnose":
        if (diagnosis := diagnosis_of(row)) is not None:
            target = " and ".join(diagnosis.targets) or (row["absent"][0] if row["absent"] else diagnosis.answer)
            yield Asked(target, diagnosis.masks, answer=diagnosis.answer, answer_type=OPEN)
    elif intent == "is_there":
        answers = [(target, "yes") for target in targets]
        answers += [(target, "no") for target in present.absent(row, len(targets), chance)]
        for target, answer in answers:
            yield Asked(target, key=f"#{target}", answer=answer, answer_type=CLOSED, options=("yes", "no"))
    elif intent == "where_is":
        size = read_picture(row["image"]).size
        for target in targets:  # of one mask, by its centre of gravity
            if len(masks := _masks_of(row, [target])) == 1:
                place = wording.position_in_words(read_mask(row["masks"][masks[0]], size))
                options = tuple(wording.POSITIONS)
                yield Asked(target, key=f"#{target}", answer=place, answer_type=CLOSED, options=options)
    elif answer := _kind(intent, row):
        yield Asked(answer=answer, answer_type=CLOSED, options=kinds)


def _masks_of(row: Row, targets: Sequence[str]) -> tuple[int, ...]:
    """The masks of structures, one structure after the other."""
    return tuple(index for target in targets for index, name in enumerate(row["targets"]) if name == target)
