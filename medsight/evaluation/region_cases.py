"""Images with masks as cases: what is asked of each follows from the benchmark's intent."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsight.data.groups import Groups
from medsight.data.pictures import read_mask, read_picture
from medsight.data.sources import Source, iterate
from medsight.data.wording import Vocabulary, enumerate_words, picture_words, position_in_words, with_article

from .benchmarks import Benchmark
from .cases import CLOSED, OPEN, Case, Words, origin_of, relative, wordings
from .diagnosis import diagnosis_of


Row = Mapping[str, Any]
MOST_NAMED = 4  # structures in one question


@dataclass(frozen=True)
class Asked:
    """One question about a row of `REGION_FEATURES`.

    Attributes:
        target: what it is about: one structure, or several in words.
        masks: of the reference, as indices into the row's.
        named: whether the masks are of several structures, told apart by name.
        key: what the case's id says after the image's.
        answer, answer_type: the reference answer, where answers are scored.
    """

    target: str | None = None
    masks: tuple[int, ...] = ()
    named: bool = False
    key: str = ""
    answer: str | None = None
    answer_type: str | None = None


class Present:
    """What the images of a benchmark show, by modality and site: so that what is absent from one can be told.

    Args:
        rows: all of the benchmark.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._groups = Groups.of_pairs([(row["modality"], row["site"]) for row in rows])
        vocabulary = Vocabulary.from_rows(rows, self._groups)
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


def region_cases(benchmark: Benchmark, path: Path, words: Words) -> tuple[list[Case], int]:
    """What the benchmark's intent asks of each image of its split, in the order of the files; the number of data sets.

    Raises:
        OSError, ValueError: the files are not there, or a row is bad.
    """
    rows = [entry.checked() for entry in iterate(Source(benchmark.layout, str(path), split=benchmark.split))]
    ask, cases = ASKS[benchmark.chosen_intent()], []
    present = Present(rows)
    for row in rows:
        image = relative(row["image"]["path"], path)
        for asked in ask(row, present, random.Random(image)):
            identity = image + asked.key
            sizes = {tuple(row["spacing_mm"][mask] or ()) for mask in asked.masks}
            cases.append(
                Case(
                    id=identity,
                    prompt=words.prompt(identity, _fields(row, asked.target or "")),
                    images=(row["image"],),
                    answer=asked.answer,
                    answer_type=asked.answer_type,
                    target=asked.target,
                    absent=benchmark.has_masks and not asked.masks,
                    masks=tuple(row["masks"][mask] for mask in asked.masks),
                    mask_targets=tuple(row["targets"][mask] for mask in asked.masks) if asked.named else (),
                    spacing_mm=(sizes.pop() or None) if len(sizes) == 1 else None,
                    **origin_of(row),
                )
            )
    return cases, len({row["dataset"] for row in rows})


def _one(row: Row, present: Present, chance: random.Random) -> Iterator[Asked]:
    """Each structure, and each that the row says is absent."""
    for target in [*dict.fromkeys(row["targets"]), *row["absent"]]:
        yield Asked(target, _masks_of(row, [target]), key=f"#{target}")


def _several(row: Row, present: Present, chance: random.Random) -> Iterator[Asked]:
    """Two to `MOST_NAMED` of the image's structures, drawn by its name, in the order drawn."""
    targets = sorted(set(row["targets"]))
    if len(targets) > 1:
        chosen = chance.sample(targets, chance.randint(2, min(MOST_NAMED, len(targets))))
        yield Asked(enumerate_words(chosen), _masks_of(row, chosen), named=True)


def _all(row: Row, present: Present, chance: random.Random) -> Iterator[Asked]:
    """All structures that the row has masks of."""
    if targets := sorted(set(row["targets"])):
        yield Asked(enumerate_words(targets), _masks_of(row, targets), named=True)


def _diagnosis(row: Row, present: Present, chance: random.Random) -> Iterator[Asked]:
    """The diagnosis, where the row has one."""
    if (diagnosis := diagnosis_of(row)) is not None:
        target = " and ".join(diagnosis.targets) or (row["absent"][0] if row["absent"] else diagnosis.answer)
        yield Asked(target, diagnosis.masks, answer=diagnosis.answer, answer_type=OPEN)


def _presence(row: Row, present: Present, chance: random.Random) -> Iterator[Asked]:
    """Each structure, "yes"; as many that are absent, "no": see `Present.absent`."""
    targets = list(dict.fromkeys(row["targets"]))
    for target in targets:
        yield Asked(target, key=f"#{target}", answer="yes", answer_type=CLOSED)
    for target in present.absent(row, len(targets), chance):
        yield Asked(target, key=f"#{target}", answer="no", answer_type=CLOSED)


def _place(row: Row, present: Present, chance: random.Random) -> Iterator[Asked]:
    """Where each structure of one mask lies, by its centre of gravity."""
    size = read_picture(row["image"]).size
    for target in dict.fromkeys(row["targets"]):
        masks = _masks_of(row, [target])
        if len(masks) == 1:
            place = position_in_words(read_mask(row["masks"][masks[0]], size))
            yield Asked(target, key=f"#{target}", answer=place, answer_type=OPEN)


def _modality(row: Row, present: Present, chance: random.Random) -> Iterator[Asked]:
    yield Asked(answer=wordings().modality(row["modality"]), answer_type=OPEN)


def _site(row: Row, present: Present, chance: random.Random) -> Iterator[Asked]:
    if row["site"]:
        yield Asked(answer=row["site"], answer_type=OPEN)


ASKS: dict[str, Callable[[Row, Present, random.Random], Iterator[Asked]]] = {
    "segment_one": _one,
    "segment_several": _several,
    "segment_all": _all,
    "diagnose": _diagnosis,
    "is_there": _presence,
    "where_is": _place,
    "modality": _modality,
    "site": _site,
}


def _masks_of(row: Row, targets: Sequence[str]) -> tuple[int, ...]:
    """The masks of structures, one structure after the other."""
    return tuple(index for target in targets for index, name in enumerate(row["targets"]) if name == target)


def _fields(row: Row, target: str) -> dict[str, str]:
    """What a prompt may name in braces."""
    asked = {"target": target, "targets": target, "a_target": with_article(target)}
    return {**asked, **picture_words(row, wordings())}
