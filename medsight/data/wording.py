"""Conversations about region rows: a question drawn from the wordings of templates.yaml, an answer from the row.

Where an answer cites a region it holds a numbered slot; the code is put in when the perceiver and the codebook have
given the image's masks their codes (see `annotate`).

Answers to "where is" name the side of the *picture*: what is trained on them must not be flipped or turned afterwards.
"""

import random
import re
import string
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from processing_medsight.grounded_answer_medsight import tidy_answer
from processing_medsight.region_codes_medsight import structures_of_groups

from .groups import Groups
from .templates import Wordings, draw_alternatives, matches


MAX_REGIONS = 5  # as published (paper, unified tuning)
MAX_NAMED = 5  # structures in one question
SYNONYM_SHARE = 0.35  # of the prompts that name a structure which has synonyms
LISTED_SHARE = 0.6  # of the absent structures asked for, where the image's own row lists some
# Of a picture's fifths two are upper, one is between, two are lower; two left, one between, two right.
POSITIONS = [
    *("upper left", "upper middle", "upper right"),
    *("left", "centre", "right"),
    *("lower left", "lower middle", "lower right"),
]


@dataclass(frozen=True)
class Turn:
    """One question about one image and its answer.

    Attributes:
        intent: what is asked, as templates.yaml names it; "absent" where what is asked for is not there.
        prompt: the user's words.
        answer: the assistant's words, `{0}`, `{1}`, ... where the code of `regions[i]` is cited; other braces doubled.
        regions: the masks cited, as indices into the row's masks, in the order of their codes.
        absent: the structure that the answer says is not in the image, if it says so of one.
    """

    intent: str
    prompt: str
    answer: str
    regions: tuple[int, ...] = ()
    absent: str | None = None

    def text(self, codes: Sequence[str]) -> str:
        """The answer with region codes in it, one a region."""
        return self.answer.format(*codes)


@dataclass(frozen=True)
class Vocabulary:
    """Which targets the images of each group can show.

    Attributes:
        groups: the groups.
        targets: for each group, in the order of `groups.names`, the targets that any of its images has a mask of.
    """

    groups: Groups
    targets: tuple[frozenset[str], ...]

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], groups: Groups) -> "Vocabulary":
        """Read `modality`, `site` and `targets` of region rows once, streaming; pictures are not touched.

        Raises:
            ValueError: for a row that no group matches.
        """
        if hasattr(rows, "select_columns"):
            rows = rows.select_columns(["modality", "site", "targets"])
        targets: list[set[str]] = [set() for _ in groups.names]
        for row in rows:
            targets[groups.index(row["modality"], row["site"])].update(row["targets"])
        return cls(groups, tuple(map(frozenset, targets)))

    def with_codes(self, region_codes: Mapping[str, Any] | None) -> "Vocabulary":
        """The same with the structures that a model's codes stand for besides, by the content of region_codes.json."""
        known = structures_of_groups(region_codes, len(self.targets))
        return Vocabulary(self.groups, tuple(map(frozenset.union, self.targets, known)))

    def unrelated_targets(self, group: int, wordings: Wordings) -> list[list[str]]:
        """Targets that only groups unrelated to this one can show, in a list for each of those groups."""
        near: set[str] = set()
        far = []
        for name, targets in zip(self.groups.names, self.targets, strict=True):
            if wordings.related(self.groups.names[group], name):
                near |= targets
            else:
                far.append(targets)
        return [sorted(targets - near) for targets in far if targets - near]


class ConversationMaker:
    """Draws questions about region rows and answers them from what the rows say.

    A structure is called absent only where the row lists it, or where no group that can show it is related to the
    image's group. Where a structure has more masks than `max_regions`, it is not asked for. All that an image shows is
    asked for only where the row says of every structure of its group whether it is there.

    Args:
        wordings: see [`Wordings`].
        vocabulary: see [`Vocabulary`].
        generator: source of all choices; may be replaced between two turns.
        max_regions: most codes in an answer; a question names at most `MAX_NAMED` structures all the same.
        noise: share of a prompt's words, names left out, that are misspelt or missing, so that what is learnt is not
            one wording (Wei and Zou, 2019, EDA).

    Raises:
        ValueError: for `max_regions` below 1, or `noise` that is no share.
    """

    def __init__(
        self,
        wordings: Wordings,
        vocabulary: Vocabulary,
        generator: random.Random,
        *,
        max_regions: int = MAX_REGIONS,
        noise: float = 0.0,
    ) -> None:
        if not 0 <= noise < 1:
            raise ValueError(f"noise={noise}: expected a share of the words, from 0 to below 1")
        if max_regions < 1:
            raise ValueError(f"max_regions={max_regions}: expected at least 1")
        self.wordings, self.groups, self.generator = wordings, vocabulary.groups, generator
        self.max_regions, self.noise = max_regions, noise
        self.targets = vocabulary.targets
        self.elsewhere = [vocabulary.unrelated_targets(k, wordings) for k in range(len(vocabulary.targets))]

    def grounded(self, row: Mapping[str, Any], places: Sequence[str]) -> Turn:
        """A question whose answer cites regions, or says that there is nothing to cite.

        Where a row allows none (no mask, and nothing is known to be absent), a plain one.

        Args:
            row: a row of `REGION_FEATURES`; its pictures are not read.
            places: `position_in_words` of each of its masks.
        """
        regions, absent = self._citable(row), self._absent_targets(row)
        possible = {
            "segment_one": bool(regions),
            "segment_several": sum(sorted(map(len, regions.values()))[:2]) <= self.max_regions and len(regions) > 1,
            "segment_all": bool(regions) and len(row["targets"]) <= self.max_regions and self._is_whole(row),
            "where_is": any(len(masks) == 1 for masks in regions.values()),
            "is_there": bool(regions),
            "diagnose": self._may_diagnose(row, regions),
            "absent": bool(absent),
        }
        weights = {name: weight for name, weight in self.wordings.weights["grounded"].items() if possible[name]}
        if not any(weights.values()):
            return self.plain(row)
        intent = self._draw(weights)
        if intent == "absent":
            return self._absent(row, absent)
        if intent == "where_is":
            regions = {target: masks for target, masks in regions.items() if len(masks) == 1}
        if intent in ("segment_one", "where_is", "is_there"):
            return self._one_structure(intent, row, regions, places)
        if intent == "segment_all":
            return self._turn(row, intent, intent, cited=regions)
        return self._diagnose(row, regions) if intent == "diagnose" else self._segment_several(row, regions)

    def plain(self, row: Mapping[str, Any]) -> Turn:
        """A question whose answer needs no region: caption, modality, body site, an absent structure."""
        weights, absent = dict(self.wordings.weights["plain"]), self._absent_targets(row)
        if not absent:
            del weights["absent"]
        intent = self._draw(weights)
        if intent == "absent":
            return self._absent(row, absent)
        if intent != "caption":
            return self._turn(row, intent, intent)
        for answer, targets in (("caption", row["targets"]), ("caption_without_targets", row["absent"])):
            if targets:
                return self._turn(row, "caption", answer, words={"targets": enumerate_words(sorted(set(targets)))})
        return self._turn(row, "caption", "caption_bare")

    def _citable(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        """The masks of each target that an answer may cite, by target in alphabetical order."""
        regions: dict[str, list[int]] = {target: [] for target in sorted(set(row["targets"]))}
        for index, target in enumerate(row["targets"]):
            regions[target].append(index)
        return {target: masks for target, masks in regions.items() if len(masks) <= self.max_regions}

    def _is_whole(self, row: Mapping[str, Any]) -> bool:
        """Whether it is known of all structures that images of its group can show if they are in a row's image."""
        return self.targets[self.groups.index(row["modality"], row["site"])] <= {*row["targets"], *row["absent"]}

    def _absent_targets(self, row: Mapping[str, Any]) -> list[list[str]]:
        """Structures that are surely not in the image: those that the row lists, then those of unrelated groups."""
        elsewhere = self.elsewhere[self.groups.index(row["modality"], row["site"])]
        known = set(row["targets"])
        lists = [[target for target in targets if target not in known] for targets in elsewhere]
        if row["absent"] and (not any(lists) or self.generator.random() < LISTED_SHARE):
            return [list(row["absent"])]
        return [targets for targets in lists if targets]

    def _is_normal(self, row: Mapping[str, Any]) -> bool:
        return bool(row["finding"]) and matches(row["finding"], self.wordings.findings["normal"])

    def _may_diagnose(self, row: Mapping[str, Any], regions: Mapping[str, list[int]]) -> bool:
        """Whether masks show what is wrong, or the row says without any: what it is, or that nothing is."""
        if self._is_normal(row):
            return bool(row["absent"])
        return bool(self._signs(row, regions)) or bool(row["finding"]) and not row["targets"]

    def _signs(self, row: Mapping[str, Any], regions: Mapping[str, list[int]]) -> list[str]:
        """Targets that show what is wrong, as `signs_of` says, where an answer may cite all of their masks."""
        only = len(set(row["targets"])) == 1
        signs = signs_of(row["finding"], list(regions), self.wordings.findings["abnormal"], only)
        return signs if sum(len(regions[target]) for target in signs) <= self.max_regions else []

    def _draw(self, weights: Mapping[str, float]) -> str:
        return self.generator.choices(list(weights), list(weights.values()))[0]

    def _called(self, target: str, row: Mapping[str, Any]) -> str:
        """How a user may call a target: a synonym only if no other structure of the image goes by it too."""
        synonyms = self.wordings.synonyms
        taken = {name for other in set(row["targets"]) - {target} for name in (other, *synonyms.get(other, ()))}
        names = [name for name in synonyms.get(target, ()) if name not in taken]
        return self.generator.choice(names) if names and self.generator.random() < SYNONYM_SHARE else target

    def _turn(
        self,
        row: Mapping[str, Any],
        prompt: str,
        answer: str,
        *,
        cited: Mapping[str, Sequence[int]] | None = None,
        asked: Mapping[str, str] | None = None,
        words: Mapping[str, str] | None = None,
        **rest: Any,
    ) -> Turn:
        """Fill in a prompt with `asked`, and an answer with `words` and the masks `cited`, by their targets."""
        picture = picture_words(row, self.wordings)
        drawn = draw_alternatives(self.generator.choice(self.wordings.prompts[prompt]), self.generator)
        question = self._rough(drawn).format(**picture, **(asked or {}))
        literal = {name: _literal(word) for name, word in {**picture, **(words or {})}.items()}
        masks = [(target, mask) for target, indices in (cited or {}).items() for mask in indices]
        slots = [f"{{{slot}}}" for slot in range(len(masks))]
        named = ", ".join(f"{_literal(target)} {slot}" for (target, _), slot in zip(masks, slots, strict=True))
        codes = enumerate_words(slots) if slots else ""
        reply = self.generator.choice(self.wordings.answers[answer]).format(**literal, cited=named, codes=codes)
        regions = tuple(mask for _, mask in masks)
        return Turn(**{"intent": prompt, "prompt": question, "answer": reply, "regions": regions, **rest})

    def _rough(self, prompt: str) -> str:
        """A prompt as somebody in a hurry writes it: see `noise`."""
        if not self.noise:
            return prompt
        words = []
        for word in prompt.split():
            chance = self.generator.random()
            if "{" in word or chance >= self.noise:
                words.append(word)
            elif chance < self.noise / 2:
                place = self.generator.randrange(len(word))
                words.append(word[:place] + self.generator.choice(string.ascii_lowercase) + word[place + 1 :])
        return " ".join(words) or prompt

    def _one_structure(
        self, intent: str, row: Mapping[str, Any], regions: Mapping[str, list[int]], places: Sequence[str]
    ) -> Turn:
        target = self.generator.choice(list(regions))
        asked, words = _asked(self._called(target, row)), {"place": places[regions[target][0]]}
        return self._turn(row, intent, intent, cited={target: regions[target]}, asked=asked, words=words)

    def _segment_several(self, row: Mapping[str, Any], regions: Mapping[str, list[int]]) -> Turn:
        wanted = self.generator.randint(2, min(MAX_NAMED, self.max_regions, len(regions)))
        chosen = self._fitting(self.generator.sample(list(regions), len(regions)), regions)[:wanted]
        if len(chosen) < 2:
            chosen = self._fitting(sorted(regions, key=lambda target: len(regions[target])), regions)[:2]
        names = [self._called(target, row) if self.generator.random() < 0.5 else target for target in chosen]
        joined = enumerate_words(names) if self.generator.random() < 0.7 else ", ".join(names)
        cited = {target: regions[target] for target in chosen}
        return self._turn(row, "segment_several", "segment_several", cited=cited, asked={"targets": joined})

    def _fitting(self, targets: Sequence[str], regions: Mapping[str, list[int]]) -> list[str]:
        """Those of the targets, in order, whose masks can be cited together."""
        chosen, count = [], 0
        for target in targets:
            if count + len(regions[target]) <= self.max_regions:
                chosen.append(target)
                count += len(regions[target])
        return chosen

    def _diagnose(self, row: Mapping[str, Any], regions: Mapping[str, list[int]]) -> Turn:
        finding, signs = row["finding"], self._signs(row, regions)
        if self._is_normal(row):
            target = self.generator.choice(row["absent"])
            words = {"finding": finding, "target": target}
            return self._turn(row, "diagnose", "diagnose_normal", words=words, absent=target)
        if not signs:
            return self._turn(row, "diagnose", "diagnose_without_mask", words={"finding": finding})
        finding, answer = finding or enumerate_words(signs), "diagnose_by_target"
        if len(signs) == 1 and names_finding(signs[0], finding):
            finding, answer = signs[0], "diagnose"
        cited = {target: regions[target] for target in signs}
        return self._turn(row, "diagnose", answer, cited=cited, words={"finding": finding})

    def _absent(self, row: Mapping[str, Any], absent: Sequence[Sequence[str]]) -> Turn:
        # A group first: else one group of many organs would teach that organs are absent.
        target = self.generator.choice(self.generator.choice(absent))
        # A synonym such as "lesion" may be said of something else in the image, unless the row rules that out.
        asked = _asked(self._called(target, row) if target in row["absent"] else target)
        prompt = self._draw(self.wordings.weights["absent"])
        words = {"target": target}
        return self._turn(row, prompt, "absent", asked=asked, words=words, intent="absent", absent=target)


def signs_of(finding: str | None, targets: Sequence[str], abnormal: Collection[str], only: bool) -> list[str]:
    """Structures that show what is wrong: those that name the finding, else abnormal ones, else the only one there is;
    without a finding, abnormal ones.

    Args:
        abnormal: patterns of names that are.
        only: whether the image shows a single structure.
    """
    signs = [target for target in targets if matches(target, abnormal)]
    if not finding:
        return signs
    return [target for target in targets if names_finding(target, finding)] or signs or list(targets if only else ())


def names_finding(target: str, finding: str) -> bool:
    """Whether a structure's name has a finding in it, in whole words."""
    return re.search(rf"(?<!\w){re.escape(finding)}(?!\w)", target, flags=re.IGNORECASE) is not None


def position_in_words(mask: np.ndarray) -> str:
    """Where a mask's centre of gravity lies in its picture: one of `POSITIONS`.

    Args:
        mask: (H, W), boolean or >= 0.

    Raises:
        ValueError: for an empty mask.
    """
    weights = np.asarray(mask, dtype=np.float64)
    total, (height, width) = weights.sum(), weights.shape
    if not total > 0:
        raise ValueError("an empty mask is nowhere: expected at least one pixel inside")
    y = float(weights.sum(1) @ (np.arange(height) + 0.5) / total / height)
    x = float(weights.sum(0) @ (np.arange(width) + 0.5) / total / width)
    return POSITIONS[3 * ((y >= 0.4) + (y > 0.6)) + (x >= 0.4) + (x > 0.6)]


def enumerate_words(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def picture_words(row: Mapping[str, Any], wordings: Wordings) -> dict[str, str]:
    """What any prompt about a row's picture may name in braces: its modality, bare and with an article, and its site.

    Raises:
        ValueError: see [`Wordings.modality`].
    """
    modality = wordings.modality(row["modality"])
    article = with_article(modality)
    capital = article[0].upper() + article[1:]
    return {"modality": modality, "a_modality": article, "A_modality": capital, "site": row["site"] or ""}


def with_article(words: str) -> str:
    """ "a CT image", "an ultrasound image", "an MRI": by the first letter, in an abbreviation by its name."""
    spelled_out = re.match(r"[A-Z](?![a-z])", words) is not None
    vowels = "AEFHILMNORSX" if spelled_out else "AEIOUaeiou"
    return f"{'an' if words[:1] in vowels else 'a'} {words}"


def corpus_texts(
    maker: ConversationMaker, rows: Iterable[Mapping[str, Any]], rounds: int = 1
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Questions and answers of the corpus without images and without codes, for training the language model alone.

    A grounded and a plain pair for every row and round; positions are drawn by lot, since no picture is read. Each
    comes with the row's `dataset` and the `targets` of which the answer had cited a mask.

    Raises:
        ValueError: as [`Groups.index`] and [`Wordings.modality`].
    """
    if hasattr(rows, "remove_columns"):
        rows = rows.remove_columns(["image", "masks"])
    for _ in range(rounds):
        for row in rows:
            places = [maker.generator.choice(POSITIONS) for _ in row["targets"]]
            for turn in (maker.grounded(row, places), maker.plain(row)):
                pieces = re.split(r"(?<!\{)\{\d+\}(?!\})", turn.answer)
                origin = {"dataset": row["dataset"], "targets": [row["targets"][mask] for mask in turn.regions]}
                yield turn.prompt, tidy_answer([piece.format() for piece in pieces])[0], origin


def _literal(text: str) -> str:
    """Text that str.format leaves as it is."""
    return text.replace("{", "{{").replace("}", "}}")


def _asked(name: str) -> dict[str, str]:
    return {"target": name, "a_target": with_article(name)}
