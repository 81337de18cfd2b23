"""Grounded conversations from manifest records: wordings are data (templates.yaml), this module fills them in.

Where an answer cites a region it holds a numbered slot; the code is put in when the perceiver and the codebook have
given the image's masks their codes.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from .data import GROUP_NAMES, ImageRecord


@dataclass(frozen=True)
class Turn:
    """One question about one image and its answer.

    Attributes:
        prompt: the user's words.
        answer: the assistant's words, `{0}`, `{1}`, … where the code of `regions[i]` is cited.
        regions: targets cited, in the order of their codes.
    """

    prompt: str
    answer: str
    regions: tuple[str, ...] = ()

    def text(self, codes: list[str]) -> str:
        """The answer with region codes in it, one code a region."""
        if len(codes) != len(self.regions):
            raise ValueError(f"{len(codes)} codes for {len(self.regions)} regions of the answer {self.answer!r}")
        return self.answer.format(*codes)


def load_templates(path: str | Path) -> dict:
    """Read the wordings; raises FileNotFoundError or ValueError naming the file and what it lacks."""
    templates = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for key in ("prompts", "answers", "synonyms", "modalities", "families"):
        if key not in templates:
            raise ValueError(f"{path}: no section {key!r}")
    return templates


def position_in_words(mask: torch.Tensor) -> str:
    """Where a mask's centre of gravity lies in its image, in thirds: "upper left", "centre", …; mask (H, W) >= 0."""
    height, width = mask.shape
    total = mask.sum().clamp(min=1e-6)
    y = float((mask.sum(1) * torch.arange(height)).sum() / total) / height
    x = float((mask.sum(0) * torch.arange(width)).sum() / total) / width
    vertical = "upper" if y < 0.4 else "lower" if y > 0.6 else ""
    horizontal = "left" if x < 0.4 else "right" if x > 0.6 else ""
    return " ".join(filter(None, (vertical, horizontal))) or "centre"


def enumerate_words(words: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


class ConversationMaker:
    """Draws questions about records and answers them from the manifest.

    Args:
        templates: as `load_templates` gives them.
        records: all training records: which targets a group can show, and so what is absent elsewhere.
        generator: source of all choices.
    """

    def __init__(self, templates: dict, records: list[ImageRecord], generator: random.Random) -> None:
        self.prompts, self.answers = templates["prompts"], templates["answers"]
        self.synonyms, self.modalities = templates["synonyms"], templates["modalities"]
        self.random = generator
        self.groups_of_target: dict[str, set[int]] = {}
        for record in records:
            for target in record.masks:
                self.groups_of_target.setdefault(target, set()).add(record.group)
        self.family: list[set[int]] = [{index} for index in range(len(GROUP_NAMES))]
        for names in templates["families"].values():
            members = {GROUP_NAMES.index(name) for name in names}
            for index in members:
                self.family[index] |= members

    def absent_targets(self, record: ImageRecord) -> dict[int, list[str]]:
        """Targets of unrelated groups only, by group: surely not in the image, whatever its rows leave out."""
        elsewhere: dict[int, list[str]] = {}
        for target, groups in self.groups_of_target.items():
            if not groups & self.family[record.group]:
                elsewhere.setdefault(min(groups), []).append(target)
        return elsewhere

    def grounded(self, record: ImageRecord, masks: torch.Tensor) -> Turn:
        """A question whose answer cites regions, or says that there is nothing to cite.

        Args:
            masks: (n, H, W), the record's masks in its order, for the words that tell a position.
        """
        present = sorted(record.masks)
        weights: dict[str, float] = {"absent": 1}
        if present:
            weights = {"segment_one": 5, "where_is": 1, "is_there": 1, "absent": 2, "segment_all": 1.5}
        if len(present) > 1:
            weights["segment_several"] = 3
        if record.dataset == "busi":
            weights["diagnose"] = 4
        intent = self.random.choices(list(weights), list(weights.values()))[0]
        return getattr(self, f"_{intent}")(record, masks)

    def plain(self, record: ImageRecord) -> Turn:
        """A question whose answer needs no region: caption, modality, body site, an absent structure."""
        intent = self.random.choices(("caption", "modality", "site", "absent"), (4, 1, 1, 2))[0]
        if intent == "absent":
            return self._absent(record, torch.zeros(0, 1, 1))
        words = self._words(record)
        if intent != "caption":
            return self._turn(intent, intent, words)
        targets, key = sorted(record.masks), "caption"
        if not targets:
            targets, key = list(record.absent), "caption_without_targets"
        return self._turn("caption", key, {**words, "targets": enumerate_words(targets)})

    def _words(self, record: ImageRecord) -> dict[str, str]:
        return {"modality": self.modalities[record.modality], "site": record.site}

    def _turn(
        self, prompt: str, answer: str, words: dict[str, str], regions: tuple[str, ...] = (), **asked: str
    ) -> Turn:
        question = self.random.choice(self.prompts[prompt]).format(**{**words, **asked})
        return Turn(question, self.random.choice(self.answers[answer]).format(**words), regions)

    def _called(self, target: str) -> str:
        """How a user may call a target."""
        others = self.synonyms.get(target, [])
        return self.random.choice(others) if others and self.random.random() < 0.35 else target

    def _segment_one(self, record: ImageRecord, masks: torch.Tensor) -> Turn:
        target = self.random.choice(sorted(record.masks))
        words = {**self._words(record), "target": target, "region": f"{target} {{0}}"}
        return self._turn("segment_one", "segment_one", words, (target,), target=self._called(target))

    def _where_is(self, record: ImageRecord, masks: torch.Tensor) -> Turn:
        target = self.random.choice(sorted(record.masks))
        place = position_in_words(masks[record.targets.index(target)])
        words = {**self._words(record), "target": target, "region": f"{target} {{0}}", "place": place}
        return self._turn("where_is", "where_is", words, (target,), target=self._called(target))

    def _is_there(self, record: ImageRecord, masks: torch.Tensor) -> Turn:
        target = self.random.choice(sorted(record.masks))
        words = {**self._words(record), "target": target, "region": f"{target} {{0}}"}
        return self._turn("is_there", "is_there", words, (target,), target=self._called(target))

    def _segment_several(self, record: ImageRecord, masks: torch.Tensor) -> Turn:
        targets = sorted(record.masks)
        targets = self.random.sample(targets, self.random.randint(2, min(5, len(targets))))
        asked = [self._called(target) if self.random.random() < 0.5 else target for target in targets]
        joined = enumerate_words(asked) if self.random.random() < 0.7 else ", ".join(asked)
        words = {**self._words(record), "cited": _cite(targets)}
        return self._turn("segment_several", "segment_several", words, tuple(targets), targets=joined)

    def _segment_all(self, record: ImageRecord, masks: torch.Tensor) -> Turn:
        targets = sorted(record.masks)
        return self._turn(
            "segment_all", "segment_all", {**self._words(record), "cited": _cite(targets)}, tuple(targets)
        )

    def _diagnose(self, record: ImageRecord, masks: torch.Tensor) -> Turn:
        if not record.masks:
            return self._turn("diagnose", "absent", {**self._words(record), "target": record.absent[0]})
        target = sorted(record.masks)[0]
        words = {**self._words(record), "target": target, "code": "{0}"}
        return self._turn("diagnose", "diagnose", words, (target,))

    def _absent(self, record: ImageRecord, masks: torch.Tensor) -> Turn:
        if record.absent and self.random.random() < 0.6:
            target = self.random.choice(record.absent)
        else:  # by group first: else one group of many organs would teach that organs are absent
            target = self.random.choice(self.random.choice(list(self.absent_targets(record).values())))
        prompt = self.random.choices(("segment_one", "where_is", "is_there"), (3, 1, 1))[0]
        words = {**self._words(record), "target": target}
        return self._turn(prompt, "absent", words, target=self._called(target))


def _cite(targets: list[str]) -> str:
    return ", ".join(f"{target} {{{index}}}" for index, target in enumerate(targets))


def _without_codes(turn: Turn) -> str:
    answer = turn.answer.replace(", segmented as {0}", "")
    return re.sub(r" \{\d+\}", "", answer)


def corpus_texts(maker: ConversationMaker, records: list[ImageRecord], rounds: int) -> list[tuple[str, str]]:
    """Question and answer pairs of the corpus without its images and without codes: for the language model alone."""
    pairs = []
    for _ in range(rounds):
        for record in records:
            whole = torch.ones(len(record.masks), 3, 3)
            for turn in (maker.grounded(record, whole), maker.plain(record)):
                pairs.append((turn.prompt, _without_codes(turn)))
    return pairs
