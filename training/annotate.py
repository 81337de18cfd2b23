"""Bring your own masks: gives each mask its region code and writes grounded conversations about the images.

medsight data annotate my-masks --model my-model --output my-conversations
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from configuration_medsight.configuration_medsight import MedSightConfig
from medsight.data.groups import Groups
from medsight.text import nearest

from .annotation import annotate
from .annotation_output import AnnotationCounts


__all__ = ["annotate", "load_groups", "match_groups", "summary"]


def summary(counts: AnnotationCounts) -> str:
    """A table of what was made, for a terminal."""
    lines = [f"{counts.images} images, {counts.conversations} conversations", ""]
    lines += [f"{name:<24}{count:>8}" for name, count in sorted(counts.intents.items())]
    lines += ["", f"{'group':<24}{'masks':>8}{'codes in use':>14}{'perplexity':>12}"]
    for name, usage in counts.code_usage().items():
        used = f"{usage['used']} of {usage['codes']}"
        lines.append(f"{name:<24}{usage['masks']:>8}{used:>14}{usage['perplexity']:>12}")
    if counts.masks_beyond_queries:
        lines.append(f"\n{counts.masks_beyond_queries} masks beyond the number of region queries of their image")
    if counts.skipped:
        lines.append(f"\n{len(counts.skipped)} images left out, each named in README.md")
    return "\n".join(lines)


def match_groups(config: MedSightConfig, pairs: Iterable[tuple[str, str]], named: Groups | None = None) -> Groups:
    """The model's groups with the patterns of the data's pairs of modality and site.

    A pair belongs to the group that `named` has for it, or else to the first that has a pattern for it, or else to the
    group called "MODALITY SITE", whatever the case, or else to that of its modality up to the first hyphen ("MRI-T1",
    "brain" to "MRI brain").

    Raises:
        ValueError: for a pair without such a group, naming it and the groups.
    """
    names, known = config.group_names, config.group_patterns or {}
    by_name = {name.lower(): name for name in names}
    patterns: dict[str, list[str]] = {name: list(known.get(name, [])) for name in names}
    for modality, site in sorted(set(pairs)):
        if named is not None and (k := named.find(modality, site)) is not None:
            patterns[named.names[k]].append(f"{modality}/{site}")
            continue
        if Groups(patterns).find(modality, site) is not None:
            continue
        spellings = (f"{modality} {site}".lower(), f"{modality.split('-')[0]} {site}".lower())
        found = next((by_name[spelling] for spelling in spellings if spelling in by_name), None)
        if found is None:
            raise ValueError(
                f"no code group of the model is called '{modality} {site}': its groups are {', '.join(names)}. Say "
                f"which of them it belongs to with --groups FILE or a recipe's data.groups, e.g. {names[0]!r}: "
                f"['{modality}/{site}']"
            )
        patterns[found].append(f"{modality}/{site}")
    return Groups(patterns)


def load_groups(path: str | Path, names: Sequence[str] | None) -> Groups:
    """Groups from a YAML file, group name -> patterns of "modality/site".

    Args:
        names: the model's groups, which those of the file must be among; `None` takes the file's.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a mapping, or names a group that the model has not.
    """

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or not all(
        isinstance(entry, list) and all(isinstance(pattern, str) for pattern in entry) for entry in content.values()
    ):
        raise ValueError(f"{path}: expected group names, each with a list of patterns of 'modality/site'")
    for name in content if names is not None else ():
        if name not in names:
            raise ValueError(f"{path}: the model has no code group {name!r}; {nearest(name, names)}")
    return Groups({str(name): entry for name, entry in content.items()})
