"""Wordings of conversations, read from a YAML file and checked; `templates.yaml` beside this module is the default."""

import hashlib
import random
import re
import string
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from medsight.text import nearest


TEMPLATES = Path(__file__).with_name("templates.yaml")
ALTERNATIVES = re.compile(r"\[([^][]*\|[^][]*)\]")  # "[Find|Locate] the lung[, please|]."

_PICTURE = {"modality", "a_modality", "A_modality", "site"}
# What a wording of each intent may name in braces.
PROMPT_WORDS = {
    **dict.fromkeys(("segment_one", "where_is", "is_there"), _PICTURE | {"target", "a_target"}),
    "segment_several": _PICTURE | {"targets"},
    **dict.fromkeys(("segment_all", "diagnose", "caption", "modality", "site"), _PICTURE),
}
ANSWER_WORDS = {
    **dict.fromkeys(("segment_one", "segment_several", "segment_all", "is_there"), _PICTURE | {"cited"}),
    "where_is": _PICTURE | {"cited", "place"},
    "diagnose": _PICTURE | {"finding", "codes"},
    "diagnose_by_target": _PICTURE | {"finding", "cited"},
    "diagnose_without_mask": _PICTURE | {"finding"},
    "diagnose_normal": _PICTURE | {"finding", "target"},
    "absent": _PICTURE | {"target"},
    **dict.fromkeys(("caption", "caption_without_targets"), _PICTURE | {"targets"}),
    **dict.fromkeys(("modality", "site", "caption_bare"), _PICTURE),
}
INTENTS = {
    "grounded": ("segment_one", "segment_several", "segment_all", "where_is", "is_there", "diagnose", "absent"),
    "plain": ("caption", "modality", "site", "absent"),
    "absent": ("segment_one", "where_is", "is_there"),
}


# The keys of each section, with the words that the texts of each may name; None for keys of any name.
SECTIONS: dict[str, Mapping[str, Collection[str]] | None] = {
    "weights": INTENTS,
    "prompts": PROMPT_WORDS,
    "held_out_prompts": PROMPT_WORDS,
    "answers": ANSWER_WORDS,
    "synonyms": None,
    "modalities": None,
    "families": None,
    "findings": {"abnormal": (), "normal": ()},
}


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; raises ValueError, naming it, if it is damaged."""
    try:
        return yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error


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
        sections = read_yaml(path)
        if problem := next(_problems(sections), None):
            raise ValueError(f"{path}: {problem}")
        return cls(path=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest(), **sections)

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


def _problems(sections: Any) -> Iterator[str]:
    """What is wrong with the content of a file, with its place; only the first is to be relied on."""
    yield from _wrong_keys("file", sections, SECTIONS)
    for name, keys in SECTIONS.items():
        yield from _wrong_keys(name, sections[name], keys)
    for kind, weights in sections["weights"].items():
        yield from _wrong_keys(f"weights.{kind}", weights, INTENTS[kind])
        for intent, weight in weights.items():
            if not isinstance(weight, (int, float)) or not weight >= 0:
                yield f"weights.{kind}.{intent}: expected a number of at least 0, got {weight!r}"
        if not any(weights.values()):
            yield f"weights.{kind}: all weights are 0; expected at least one above"
    for pattern, words in sections["modalities"].items():
        yield from _wrong_texts(f"modalities.{pattern}", [words], {"modality"})
    for name in SECTIONS.keys() - {"weights", "modalities"}:
        for key, texts in sections[name].items():
            yield from _wrong_texts(f"{name}.{key}", texts, (SECTIONS[name] or {}).get(key, ()))
    for intent, prompts in sections["prompts"].items():
        for prompt in prompts:
            if re.search(r"[][]", ALTERNATIVES.sub("", prompt)):
                yield f"prompts.{intent}: {prompt!r}: expected alternatives in brackets: [one|another]"
        drawable = re.compile("|".join(map(_any_drawn, prompts)), flags=re.IGNORECASE)
        for prompt in sections["held_out_prompts"][intent]:
            if ALTERNATIVES.search(prompt):
                yield f"held_out_prompts.{intent}: {prompt!r}: expected no alternatives"
            if drawable.fullmatch("".join(prompt.split())):
                yield f"held_out_prompts.{intent} and prompts.{intent} share {prompt!r}"


def _wrong_keys(where: str, value: Any, expected: Collection[str] | None) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: expected a mapping, got {type(value).__name__}"
    elif expected is not None:
        for key in value.keys() - set(expected):
            yield f"{where} has an unknown section {key!r}: {nearest(key, expected)}"
        for key in set(expected) - value.keys():
            yield f"{where} has no section {key!r}"


def _wrong_texts(where: str, texts: Any, words: Collection[str]) -> Iterator[str]:
    """Texts that name in braces anything but these words."""
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        yield f"{where}: expected a list of texts, got {texts!r:.60}"
    for text in texts:
        try:
            named = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
        except ValueError as error:
            yield f"{where}: {text!r}: {error}"
        for name in sorted(named.difference(words)):
            known = ", ".join(f"{{{word}}}" for word in sorted(words)) or "none"
            yield f"{where}: {text!r} names {{{name}}}; known here: {known}"


def _any_drawn(prompt: str) -> str:
    """A regular expression for all that a prompt can become, without spaces."""
    parts = ALTERNATIVES.split("".join(prompt.split()))  # literal, alternatives, literal, ...
    return "".join(
        f"(?:{'|'.join(map(re.escape, part.split('|')))})" if number % 2 else re.escape(part)
        for number, part in enumerate(parts)
    )
