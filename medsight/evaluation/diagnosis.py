"""What an image's row says of its diagnosis, and which of its masks show it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medsight.data.templates import matches
from medsight.data.wording import names_finding, signs_of

from .cases import wordings


@dataclass(frozen=True)
class Diagnosis:
    """What an image's row says of its diagnosis.

    Attributes:
        answer: the short answer.
        targets: the structures that show it.
        masks: their masks, as indices into the row's.

    Example:
        >>> diagnosis_of({"targets": ["liver", "liver tumor"], "finding": None})
        Diagnosis(answer='liver tumor', targets=('liver tumor',), masks=(1,))
    """

    answer: str
    targets: tuple[str, ...]
    masks: tuple[int, ...]


def diagnosis_of(row: Mapping[str, Any], finding: str | None = None) -> Diagnosis | None:
    """The diagnosis of a row of `REGION_FEATURES`; None where it has none to ask for.

    With a finding, its masks are those of the structures that name it, else of abnormal ones, else of the only one;
    a normal finding has none. Without a finding, structures that are abnormal by their names are the diagnosis.

    Args:
        finding: from a table of diagnoses, instead of the row's own.
    """
    finding = finding or row.get("finding")
    targets = list(dict.fromkeys(row["targets"]))
    findings = wordings().findings
    if finding and matches(finding, findings["normal"]):
        return Diagnosis(finding, (), ())
    signs = signs_of(finding, targets, findings["abnormal"], only=len(targets) == 1)
    answer = finding or " and ".join(signs)
    if finding and len(signs) == 1 and names_finding(signs[0], finding):
        answer = signs[0]
    if not answer:
        return None
    masks = tuple(index for index, target in enumerate(row["targets"]) if target in signs)
    return Diagnosis(answer, tuple(signs), masks)
