"""What data hold that a model does not know: mask classes and code groups, which it can be extended by."""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from configuration_medsight.configuration_medsight import MedSightConfig

from .groups import Groups, match_groups, plain_name


ROUND_VOCABULARY_TO = 64


@dataclass(frozen=True)
class Additions:
    """Mask classes and code groups that come after a model's own.

    Attributes:
        classes: names of mask classes.
        groups: code group -> shell patterns of "MODALITY/SITE".
        patterns: further patterns of groups that the model has.
        orientations: of new groups, see `MedSightConfig.group_orientations`.

    Example:
        >>> from configuration_medsight import MedSightConfig
        >>> config = MedSightConfig.from_preset("tiny", num_mask_classes=1, mask_class_names=["liver"])
        >>> found = Additions(["optic disc"], {"fundus retina": ["fundus/*"]})
        >>> extended_config(config, found).region_code_token(group=3, index=0), found.describe(config)[1]
        ('[C3_0]', '1 code group: fundus retina, with codes [C3_0] to [C3_3]')
    """

    classes: list[str] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)
    patterns: dict[str, list[str]] = field(default_factory=dict)
    orientations: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.classes or self.groups)

    def describe(self, config: MedSightConfig) -> list[str]:
        """A line about new classes and one about new groups and their codes; `config` is the model's, before or after
        it is extended."""
        lines = []
        if self.classes:
            lines.append(f"{_count(self.classes, 'mask class', 'mask classes')}: {', '.join(self.classes)}")
        if self.groups:
            first = next((k for k, name in enumerate(config.group_names) if name in self.groups), config.num_groups)
            codes = f"[C{first}_0] to [C{first + len(self.groups) - 1}_{config.codes_per_group - 1}]"
            lines.append(
                f"{_count(self.groups, 'code group', 'code groups')}: {', '.join(self.groups)}, with codes {codes}"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For JSON: names of classes, and groups with their patterns."""
        return {"classes": self.classes, "groups": self.groups}


def _count(things: Any, one: str, more: str) -> str:
    return f"{len(things)} {one if len(things) == 1 else more}"


def find_additions(
    config: MedSightConfig,
    rows: Iterable[Mapping[str, Any]],
    chosen: Groups | None = None,
    classes: Sequence[str] | None = None,
) -> Additions:
    """What images with masks hold that a model does not know, in alphabetical order.

    Args:
        config: the model's.
        rows: with `targets`, `modality`, `site` and `orientation`, as `medsight.data.schema` says.
        chosen: the groups that pairs of modality and site belong to, new ones among them; where it says nothing, a
            pair that the model has no group for becomes one.
        classes: the classes that there are to be; by default all targets.

    Raises:
        ValueError: a new class or group has the name of a known one but for case and spaces; or groups are named for a
            model without a codebook.
    """
    targets: set[str] = set(classes or ())
    lying: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        targets |= {*(() if classes else row["targets"])} - {""}
        lying[row["modality"], row["site"]].update([row["orientation"]] if row.get("orientation") else [])
    known = config.mask_class_names or []
    added = sorted(targets - {*known})
    _refuse_doubles(known, added)
    if not config.use_region_codebook:
        if chosen is not None:
            raise ValueError("the model has one [SEG] token in place of a codebook, and so no code groups to choose")
        return Additions(added)
    matched = match_groups(config, lying, chosen, extend=True)
    new = matched.names[config.num_groups :]
    _refuse_doubles(config.group_names, new)
    orientations: dict[str, Counter[str]] = defaultdict(Counter)
    for pair, counts in lying.items():
        orientations[matched.names[matched.index(*pair)]].update(counts)
    before = {name: (config.group_patterns or {}).get(name, []) for name in config.group_names}
    return Additions(
        added,
        {name: matched.patterns[name] for name in new},
        {name: matched.patterns[name] for name, listed in before.items() if matched.patterns[name] != listed},
        {name: orientations[name].most_common(1)[0][0] for name in new if orientations[name]},
    )


def _refuse_doubles(known: Sequence[str], added: Sequence[str]) -> None:
    """Raise ValueError where two names are one but for case and spaces."""
    seen = {plain_name(name): name for name in known}
    for name in added:
        if (other := seen.setdefault(plain_name(name), name)) != name:
            raise ValueError(
                f"{name!r} is {other!r} but for case and spaces: give both one name (--rename, or a source's `rename`)"
            )


def extended_config(config: MedSightConfig, additions: Additions) -> MedSightConfig:
    """The configuration of a model with these additions; where its vocabulary has no rows left for the new codes, it
    grows to a multiple of 64. Classes that had no names are called "class 0", "class 1", ..."""
    changed = copy.deepcopy(config)
    if additions.classes:
        names = config.mask_class_names or [f"class {index}" for index in range(config.num_mask_classes)]
        changed.mask_class_names = [*names, *additions.classes]
        changed.num_mask_classes = len(changed.mask_class_names)
    if additions.groups:
        changed.group_names = [*config.group_names, *additions.groups]
        changed.num_groups = len(changed.group_names)
    if additions.groups or additions.patterns:
        changed.group_patterns = {**(config.group_patterns or {}), **additions.patterns, **additions.groups}
    if additions.orientations:
        changed.group_orientations = {**(config.group_orientations or {}), **additions.orientations}
    rows = changed.region_code_start_id + changed.num_region_codes
    if rows > changed.text_config.vocab_size:
        changed.text_config.vocab_size = -(-rows // ROUND_VOCABULARY_TO) * ROUND_VOCABULARY_TO
    changed.refuse_contradictions()
    return changed
