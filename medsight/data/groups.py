"""Code groups (modality and body site), as a recipe, a file or a checkpoint names them."""

import os
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from configuration_medsight.configuration_medsight import MedSightConfig
from medsight.text import nearest

from .templates import read_yaml


class UnknownGroupError(ValueError):
    """Data, or who placed them, name a code group that the model lacks."""


class Groups:
    """Which code group an image belongs to, by its modality and site.

    Args:
        patterns: group name -> shell patterns of "modality/site"; the first group that matches counts, but one that
            names the pair itself goes before all.

    Example:
        >>> groups = Groups({"CT torso": ["CT/abdomen", "CT/chest"], "MRI": ["MRI*/*"]})
        >>> groups.names[groups.index("MRI-T1", "brain")]
        'MRI'
    """

    def __init__(self, patterns: Mapping[str, Sequence[str]]) -> None:
        self.patterns = {name: list(listed) for name, listed in patterns.items()}
        self.names = list(self.patterns)

    @classmethod
    def of_pairs(cls, pairs: Iterable[tuple[str, str]]) -> "Groups":
        """A group for each pair of modality and site, in alphabetical order."""
        return cls({f"{modality} {site}": [f"{modality}/{site}"] for modality, site in sorted(set(pairs))})

    def find(self, modality: str, site: str) -> int | None:
        """The group k of an image; None if no group has a pattern for it."""
        pair = f"{modality}/{site}"
        for matches in (str.__eq__, fnmatchcase):
            for k, listed in enumerate(self.patterns.values()):
                if any(matches(pair, pattern) for pattern in listed):
                    return k
        return None

    def index(self, modality: str, site: str) -> int:
        """The group k of an image.

        Raises:
            ValueError: if no group has a pattern for it.
        """
        if (k := self.find(modality, site)) is not None:
            return k
        raise ValueError(f"no code group matches '{modality}/{site}': the groups are {self.patterns}")


def match_groups(
    config: MedSightConfig, pairs: Iterable[tuple[str, str]], chosen: Groups | None = None, extend: bool = False
) -> Groups:
    """The model's groups with the patterns of the data's pairs of modality and site.

    A pair belongs to the group that `chosen` has for it, or else to the first that has a pattern for it, or else to
    the group called "MODALITY SITE", whatever the case, or else to that of its modality up to the first hyphen
    ("MRI-T1", "brain" to "MRI brain").

    Args:
        extend: put groups that the model lacks after its own, where a pair needs one: that of `chosen`, with all its
            patterns, or one called "MODALITY SITE".

    Raises:
        UnknownGroupError: for a pair without such a group, or a group of `chosen` that the model lacks, naming it and
            the groups.
    """
    known = config.group_patterns or {}
    patterns: dict[str, list[str]] = {name: list(known.get(name, [])) for name in config.group_names}
    if chosen is not None:
        _refuse_unknown(chosen.names, config.group_names, extend)
    by_name = {name.lower(): name for name in patterns}
    for modality, site in sorted(set(pairs), key=str):
        pair = f"{modality}/{site}"
        if chosen is not None and (k := chosen.find(modality, site)) is not None:
            name = chosen.names[k]
            patterns.setdefault(name, list(chosen.patterns[name])).append(pair)
        elif Groups(patterns).find(modality, site) is None:
            if not (modality and site):
                raise UnknownGroupError(
                    f"images of modality {modality!r} and site {site!r}: their code group follows from both; a data "
                    "source can name them (modality, site)"
                )
            found = next((by_name[name] for name in group_names_of(modality, site) if name in by_name), None)
            if found is None and not extend:
                raise UnknownGroupError(
                    f"no code group of the model is called '{modality} {site}': its groups are {', '.join(patterns)}. "
                    "Say which of them it belongs to with --groups FILE or a recipe's data.groups, e.g. "
                    f"{next(iter(patterns))!r}: ['{pair}'], or add a group: `medsight extend`, or a recipe's "
                    "model.extend: true"
                )
            patterns.setdefault(found or f"{modality} {site}", []).append(pair)
    return Groups({name: list(dict.fromkeys(listed)) for name, listed in patterns.items()})


def _refuse_unknown(chosen: Iterable[str], known: Sequence[str], extend: bool) -> None:
    """Raise UnknownGroupError for a chosen group that is none of the model's; with `extend`, for one that has the name
    of one but for case and spaces."""
    alike = {plain_name(name): name for name in known}
    for name in chosen:
        if name in known:
            continue
        if plain_name(name) in alike:
            raise UnknownGroupError(
                f"the group {name!r} is the model's {alike[plain_name(name)]!r} but for case and spaces: write it so"
            )
        if not extend:
            raise UnknownGroupError(
                f"the model has no code group {name!r}: {nearest(name, known)}. Leave this one out "
                "(data.groups: null leaves out all that a recipe inherits), or add it: `medsight extend`, or a "
                "recipe's model.extend: true"
            )


def plain_name(name: str) -> str:
    """A name without what a reader hardly sees: case, and how many spaces."""
    return " ".join(name.lower().split())


def group_names_of(modality: str, site: str) -> tuple[str, str]:
    """What the group of a modality and site may be called, in small letters; see `match_groups`."""
    return f"{modality} {site}".lower(), f"{modality.split('-')[0]} {site}".lower()


def load_groups(path: str | os.PathLike[str], names: Sequence[str] | None) -> Groups:
    """Groups from a YAML file, group name -> patterns of "modality/site".

    Args:
        names: the model's groups, which those of the file must be among; `None` takes the file's.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a mapping, or names a group that the model has not.
    """
    content = read_yaml(Path(path))
    if not isinstance(content, dict) or not all(isinstance(listed, list) for listed in content.values()):
        raise ValueError(f"{path}: expected group names, each with a list of patterns of 'modality/site'")
    for name, listed in content.items():
        if names is not None and name not in names:
            raise ValueError(f"{path}: the model has no code group {name!r}: {nearest(name, names)}")
        if not all(isinstance(pattern, str) for pattern in listed):
            raise ValueError(f"{path}: {name!r}: expected patterns of 'modality/site', got {listed}")
    return Groups(content)
