"""Wordings of conversations, read from a YAML file and checked; `templates.yaml` beside this module is the default."""

import hashlib
import random
import re
import string
from collections.abc import Collection
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from medsight.text import nearest


TEMPLATES = Path(__file__).with_name("templates.yaml")
ALTERNATIVES = re.compile(r"\[([^][]*\|[^][]*)\]")  # "[Find|Locate] the lung[, please|]."

_PICTURE = frozenset({"modality", "a_modality", "A_modality", "site"})
_TARGET = _PICTURE | {"target", "a_target"}
# What a wording of each intent may name in braces.
PROMPT_WORDS = {
    "segment_one": _TARGET,
    "segment_several": _PICTURE | {"targets"},
    "segment_all": _PICTURE,
    "where_is": _TARGET,
    "is_there": _TARGET,
    "diagnose": _PICTURE,
    "caption": _PICTURE,
    "modality": _PICTURE,
    "site": _PICTURE,
}
ANSWER_WORDS = {
    "segment_one": _PICTURE | {"cited"},
    "segment_several": _PICTURE | {"cited"},
    "segment_all": _PICTURE | {"cited"},
    "where_is": _PICTURE | {"cited", "place"},
    "is_there": _PICTURE | {"cited"},
    "diagnose": _PICTURE | {"finding", "codes"},
    "diagnose_by_target": _PICTURE | {"finding", "cited"},
    "diagnose_without_mask": _PICTURE | {"finding"},
    "diagnose_normal": _PICTURE | {"finding", "target"},
    "absent": _PICTURE | {"target"},
    "modality": _PICTURE,
    "site": _PICTURE,
    "caption": _PICTURE | {"targets"},
    "caption_without_targets": _PICTURE | {"targets"},
    "caption_bare": _PICTURE,
}
INTENTS = {
    "grounded": ("segment_one", "segment_several", "segment_all", "where_is", "is_there", "diagnose", "absent"),
    "plain": ("caption", "modality", "site", "absent"),
    "absent": ("segment_one", "where_is", "is_there"),
}


@dataclass(frozen=True)
class Wordings:
    """What a file of wordings says; `templates.yaml` tells what each section is for.

    Attributes:
        path, sha256: the file, and the hash of its bytes.

    Example:
        >>> Wordings.load().modality("CT")
        'CT image'
    """

    path: str
    sha256: str
    weights: dict[str, dict[str, float]]
    prompts: dict[str, list[str]]
    held_out_prompts: dict[str, list[str]]
    answers: dict[str, list[str]]
    synonyms: dict[str, list[str]]
    modalities: dict[str, str]
    families: dict[str, list[str]]
    findings: dict[str, list[str]]

    @classmethod
    def load(cls, path: str | Path | None = None) -> "Wordings":
        """Read a file of wordings; the one of this package by default.

        Raises:
            OSError: the file cannot be read.
            ValueError: a section or an intent is missing or unknown, or a wording names in braces what its intent does
                not know; the message names the file and the place.
        """
        path = TEMPLATES if path is None else Path(path)
        content = path.read_bytes()
        try:
            sections = yaml.safe_load(content)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
        _check_keys(path, "file", sections, [field.name for field in fields(cls)][2:])
        _check_keys(path, "weights", sections["weights"], INTENTS)
        for kind, intents in INTENTS.items():
            _check_keys(path, f"weights.{kind}", sections["weights"][kind], intents)
            _check_weights(path, f"weights.{kind}", sections["weights"][kind])
        for name, known in (
            ("prompts", PROMPT_WORDS),
            ("held_out_prompts", PROMPT_WORDS),
            ("answers", ANSWER_WORDS),
        ):
            _check_keys(path, name, sections[name], known)
            for intent, words in known.items():
                _check_wordings(path, f"{name}.{intent}", sections[name][intent], words)
        for intent, held_out in sections["held_out_prompts"].items():
            _check_brackets(path, f"prompts.{intent}", sections["prompts"][intent])
            _check_held_out(path, intent, held_out, sections["prompts"][intent])
        _check_keys(path, "findings", sections["findings"], ("abnormal", "normal"))
        for name in ("synonyms", "families", "findings"):
            for key, words in _mapping(path, name, sections[name]).items():
                _check_wordings(path, f"{name}.{key}", words, frozenset())
        for pattern, words in _mapping(path, "modalities", sections["modalities"]).items():
            _check_wordings(path, f"modalities.{pattern}", [words], frozenset({"modality"}))
        return cls(path=str(path), sha256=hashlib.sha256(content).hexdigest(), **sections)

    def modality(self, name: str) -> str:
        """A modality in words, by the first pattern in section `modalities` that matches.

        Raises:
            ValueError: if none does.
        """
        for pattern, words in self.modalities.items():
            if matches(name, [pattern]):
                return words.format(modality=name)
        raise ValueError(f"{self.path}: no pattern in section 'modalities' matches {name!r}; add one, or '*'")

    def related(self, group: str, other: str) -> bool:
        """Whether pictures of two groups may share structures: a family names both, or none names one of them."""
        mine, others = (
            {family for family, patterns in self.families.items() if matches(name, patterns)}
            for name in (group, other)
        )
        return group == other or not mine or not others or bool(mine & others)


def draw_alternatives(prompt: str, generator: random.Random) -> str:
    """A prompt with one of each bracket's alternatives, and single spaces; one without brackets as it is."""
    drawn = ALTERNATIVES.sub(lambda bracket: generator.choice(bracket[1].split("|")), prompt)
    return prompt if drawn == prompt else " ".join(drawn.split())


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether any shell pattern matches the name, whatever the case."""
    return any(fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def _mapping(path: Path, where: str, value: Any) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {where}: expected a mapping, got {type(value).__name__}")
    return value


def _check_keys(path: Path, where: str, value: Any, expected: Collection[str]) -> None:
    _mapping(path, where, value)
    for key in value:
        if key not in expected:
            raise ValueError(f"{path}: {where} has an unknown section {key!r}: {nearest(key, expected)}")
    for key in expected:
        if key not in value:
            raise ValueError(f"{path}: {where} has no section {key!r}")


def _check_weights(path: Path, where: str, weights: dict[str, Any]) -> None:
    for intent, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"{path}: {where}.{intent}: expected a number of at least 0, got {weight!r}")
    if not any(weights.values()):
        raise ValueError(f"{path}: {where}: all weights are 0; expected at least one above")


def _check_wordings(path: Path, where: str, wordings: Any, words: Collection[str]) -> None:
    if not isinstance(wordings, list) or not wordings or not all(isinstance(text, str) and text for text in wordings):
        raise ValueError(f"{path}: {where}: expected a list of texts, got {wordings!r:.60}")
    for text in wordings:
        try:
            named = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
        except ValueError as error:
            raise ValueError(f"{path}: {where}: {text!r}: {error}") from error
        for name in sorted(named - set(words)):
            known = ", ".join(f"{{{word}}}" for word in sorted(words)) or "none"
            raise ValueError(f"{path}: {where}: {text!r} names {{{name}}}; known here: {known}")


def _check_brackets(path: Path, where: str, prompts: list[str]) -> None:
    for prompt in prompts:
        if re.search(r"[][]", ALTERNATIVES.sub("", prompt)):
            raise ValueError(f"{path}: {where}: {prompt!r}: expected alternatives in brackets: [one|another]")


def _check_held_out(path: Path, intent: str, held_out: list[str], prompts: list[str]) -> None:
    """No held-out prompt is one that training can draw, whatever its case and spaces; they have no alternatives."""
    drawable = re.compile("|".join(map(_any_drawn, prompts)), flags=re.IGNORECASE)
    for prompt in held_out:
        if ALTERNATIVES.search(prompt):
            raise ValueError(f"{path}: held_out_prompts.{intent}: {prompt!r}: expected no alternatives")
        if drawable.fullmatch("".join(prompt.split())):
            raise ValueError(f"{path}: held_out_prompts.{intent} and prompts.{intent} share {prompt!r}")


def _any_drawn(prompt: str) -> str:
    """A regular expression for all that a prompt can become, without spaces."""
    parts = ALTERNATIVES.split("".join(prompt.split()))  # literal, alternatives, literal, ...
    return "".join(
        f"(?:{'|'.join(map(re.escape, part.split('|')))})" if number % 2 else re.escape(part)
        for number, part in enumerate(parts)
    )
