"""The planes that a checkpoint's code groups were learnt in, and volumes cut as they were.

A model that saw a structure in sagittal slices alone may miss it in axial ones, and be sure of what it finds there.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import logging

from medsight.checkpoint import CODES_FILE, read_json
from medsight.scans.opening import Source, open_scan
from medsight.scans.scan import Scan, plane_of
from processing_medsight.region_codes_medsight import read_region_codes


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LearntOrientations:
    """How the training images of each code group lay.

    Example:
        >>> learnt = LearntOrientations(["CT torso", "MRI brain"], {"CT torso": "LP", "MRI brain": "AI"})
        >>> in_words(learnt.orientations)
        'CT torso from axial slices (LP), MRI brain from sagittal slices (AI)'

    Attributes:
        groups: names of the code groups, in their order.
        orientations: group name -> orientation (`medsight.scans.scan.orientation_of`), where it is known.
        structures: group name -> what its codes stand for, where that is known.
    """

    groups: Sequence[str] = ()
    orientations: Mapping[str, str] = field(default_factory=dict)
    structures: Mapping[str, set[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "LearntOrientations":
        """Of a checkpoint folder; a damaged region_codes.json, of which the processor warns, says nothing."""
        config = read_json(folder / "config.json")
        structures: dict[str, set[str]] = {}
        try:
            codes = read_region_codes(folder / CODES_FILE)["codes"].values()
        except (OSError, ValueError):
            codes = ()
        for entry in codes:
            structures.setdefault(entry.get("group"), set()).update(entry["structures"])
        return cls(config.get("group_names") or (), config.get("group_orientations") or {}, structures)

    def of_question(
        self, scan: Scan, prompt: str = "", allowed_groups: str | Sequence[int | str] | None = None
    ) -> dict[str, str]:
        """The orientations of the groups that a question may be about, those that are known, by group name.

        Where the prompt names a structure, these are the groups whose codes stand for it; where they still disagree,
        those of CT for what looks like a CT, and the others for anything else.

        Args:
            scan: what is asked about; of anything but a NIfTI volume, which is shown as it is stored, there are none.
            allowed_groups: as `AnswerSettings` has them.
        """
        if scan.plane is None:
            return {}
        groups = list(self.groups)
        if allowed_groups is not None and not isinstance(allowed_groups, str):
            groups = [group for k, group in enumerate(groups) if k in allowed_groups or group in allowed_groups]
        groups = [group for group in groups if self._named(group, prompt)] or groups
        found = {group: self.orientations[group] for group in groups if group in self.orientations}
        if len(set(found.values())) > 1:
            is_ct = scan.looks_like_ct()
            found = {group: value for group, value in found.items() if group.startswith("CT") == is_ct} or found
        return found

    def _named(self, group: str, prompt: str) -> bool:
        """Whether a prompt names one of a group's structures, by its last word: "hippocampus" of the anterior one."""
        nouns = {re.escape(structure.split()[-1]) for structure in self.structures.get(group, ()) if structure.strip()}
        return bool(nouns) and re.search(rf"\b({'|'.join(nouns)})(e?s)?\b", prompt, re.IGNORECASE) is not None


def open_as_learnt(
    source: Source,
    learnt: LearntOrientations,
    plane: str | None = None,
    prompt: str = "",
    allowed_groups: str | Sequence[int | str] | None = None,
) -> Scan:
    """Opens a scan; a NIfTI volume is cut as the groups that may be asked about were learnt, or, with a warning where
    they were not, along the plane that is asked for.

    Raises:
        ValueError: as `open_scan`; or these groups were learnt in different planes, and none is asked for.
    """
    scan = open_scan(source, plane=plane)
    if plane is not None:
        if problem := cut_otherwise(scan, learnt, prompt, allowed_groups):
            logger.warning(problem)
        return scan
    found = learnt.of_question(scan, prompt, allowed_groups)
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{scan.name}: which plane? The model learnt {in_words(found)}. Name the group that the volume belongs to "
            "(--allowed-groups), or a plane or orientation (--plane)"
        )
    chosen = next(iter(found.values()), scan.orientation)
    return scan if chosen == scan.orientation else open_scan(source, plane=chosen)


def cut_otherwise(
    scan: Scan, learnt: LearntOrientations, prompt: str = "", allowed_groups: str | Sequence[int | str] | None = None
) -> str | None:
    """What to say of a volume that is cut otherwise than all groups that may be asked about were learnt."""
    found = learnt.of_question(scan, prompt, allowed_groups)
    if not found or scan.orientation in found.values():
        return None
    return (
        f"{scan.name} is cut into {scan.plane} slices ({scan.orientation}), but the model learnt {in_words(found)}: "
        "masks may be wrong, even with high scores"
    )


def in_words(orientations: Mapping[str, str]) -> str:
    """ "CT torso from axial slices (LP), MRI brain from sagittal slices (AI)"."""
    return ", ".join(f"{group} from {plane_of(found)} slices ({found})" for group, found in orientations.items())
