"""A score a row: answers by medical_vqa, masks by mask_dice, negatives by whether a mask is given."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medsight.data.pictures import read_mask, read_picture
from medsight.metrics import load
from medsight.metrics.mask_dice.mask_counts import MaskProtocol, score_item

from .benchmarks import Benchmark
from .cases import Case
from .predictions import Prediction, Problems, decode_mask


OF_CASE = ("id", "dataset", "modality", "site", "patient", "label_origin", "target", "absent", "prompt")
MASK_SCORES = ("dice", "iou", "hd95_mm", "surface_dice")


@dataclass(frozen=True)
class Protocol:
    """How rows are scored; made by `protocol_of`.

    Example:
        >>> Protocol("strict").to_dict(has_masks=False)
        {'answers': 'strict'}
    """

    answers: str | None = None  # of medical_vqa; None where answers are not scored
    masks: str | None = None  # preset of mask_dice; None where masks are not scored, or by flags
    mask_protocol: MaskProtocol = MaskProtocol()  # what the preset or the flags stand for

    def to_dict(self, has_masks: bool) -> dict[str, Any]:
        """For metrics.json: names, and every flag that they stand for."""
        masks = {"masks": self.masks or "flags", "mask_flags": dict(vars(self.mask_protocol))}
        return {**({"answers": self.answers} if self.answers else {}), **(masks if has_masks else {})}


def score_rows(
    cases: Sequence[Case],
    predictions: Mapping[str, Prediction],
    benchmark: Benchmark,
    protocol: Protocol,
    problems: Problems,
    accept_problems: bool = False,
) -> list[dict[str, Any]]:
    """The scores of every case, in their order; a case without a prediction is scored as an empty answer.

    Problems that are accepted stay counted and listed, with bad masks, which are scored as none.

    Returns:
        A dict a row: what the case and the prediction say; `answer_score`, and `answer_refused`, why there is none;
        `dice`, `iou`, `hd95_mm`, `surface_dice`, `mask_refused`, of rows with something to find; `n_masks`,
        `n_references`, `no_region` and `false_mask`; `code_structures`, what each code is cited for, None where the
        system does not say it of several structures; `reference_codes`, and whether the "data set" or the prediction's
        own "codebook" gives them; `code_accuracy` and `group_accuracy`, shares of the cited codes that are right, None
        where no code is cited or none is known.

    Raises:
        OSError, ValueError: a reference mask cannot be read, or there are problems, which are not accepted.
    """
    refuse(problems, accept_problems)
    given = [predictions.get(case.id) or Prediction(case.id, "") for case in cases]
    answers: dict[str, Any] = {}
    if protocol.answers is not None:
        texts = [prediction.answer for prediction in given]
        if protocol.answers == "closed-set":
            texts = [_without_target(text, case.target) for text, case in zip(texts, cases, strict=True)]
        answers = load("medical_vqa").compute(
            predictions=texts,
            references=[case.answer for case in cases],
            answer_types=[case.answer_type for case in cases],
            options=[list(case.options) for case in cases],
            protocol=protocol.answers,
        )
    rows = []
    for number, (case, prediction) in enumerate(zip(cases, given, strict=True)):
        row: dict[str, Any] = {
            **{name: getattr(case, name) for name in OF_CASE},
            "answer": prediction.raw_text or prediction.answer,
            "reference": case.answer,
            "answer_type": case.answer_type,
            "codes": list(prediction.codes),
            "groups": list(prediction.groups),
            "group": prediction.group,
            "is_complete": prediction.is_complete,
        }
        if answers:
            row |= {"answer_score": answers["scores"][number], "answer_refused": answers["reasons"][number]}
        if benchmark.has_masks:
            row |= _mask_scores(case, prediction, protocol, problems)
            row |= {"code_structures": _cited_for(case, prediction), **_code_scores(case, prediction)}
        rows.append(row)
    refuse(problems, accept_problems)
    return rows


def refuse(problems: Problems, accept: bool) -> None:
    """Raises ValueError, with counts and examples, where there are problems that are not accepted."""
    if problems.refused() and not accept:
        raise ValueError(
            f"the predictions do not fit the benchmark: {problems.to_text()}; put them right, or add "
            "--accept-problems to score missing rows and bad masks as nothing, the first of several, and no extra ones"
        )


def reference_masks(case: Case) -> list[np.ndarray]:
    """A case's reference masks, boolean (height, width), at the image's size; a bad one raises an error."""
    if not case.masks:
        return []
    size = read_picture(case.images[0]).size
    return [read_mask(entry, size) for entry in case.masks]


def predicted_masks(
    prediction: Prediction, size: tuple[int, int], problems: Problems | None = None
) -> dict[int, np.ndarray]:
    """A prediction's masks by their place, boolean, of the image's (height, width); bad ones are left out and noted in
    `problems`."""
    masks = {}
    for index, encoded in enumerate(prediction.masks):
        try:
            masks[index] = decode_mask(encoded, f"mask {index + 1}", size)
        except ValueError as error:
            if problems is not None:
                problems.masks.append(f"{prediction.id}: {error}")
    return masks


def by_name(
    masks: Mapping[int, np.ndarray],
    phrases: Sequence[str | None],
    references: Sequence[np.ndarray],
    names: Sequence[str],
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """An answer's masks, and the references one a structure, in the same order.

    References of one name are one structure and united; so are all masks of that name. A structure of one reference
    gets the first mask of its name. An empty mask stands for a structure without one; masks that are left over come
    last. Where the answer names none, its masks keep their order.

    Args:
        masks: by their place in the answer, of the references' size.
        phrases: what the answer calls each, whatever the case; empty where the system names none.
        names: what each reference shows.
    """
    wanted: dict[str, list[np.ndarray]] = {}
    for name, reference in zip(names, references, strict=True):
        wanted.setdefault(name, []).append(reference)
    united = [np.logical_or.reduce(parts) for parts in wanted.values()]
    if not phrases or not masks:
        return list(masks.values()), united
    left, ordered = dict(masks), []
    for name, parts in wanted.items():
        places = [place for place in left if (phrases[place] or "").casefold() == name.casefold()]
        named = [left.pop(place) for place in (places if len(parts) > 1 else places[:1])]
        ordered.append(np.logical_or.reduce([np.zeros_like(parts[0]), *named]))
    return [*ordered, *left.values()], united


def _without_target(answer: str, target: str | None) -> str:
    """An answer without the structure that was asked about: the "left" of "left kidney" is no place."""
    return re.sub(rf"\b{re.escape(target)}\b", "", answer, flags=re.IGNORECASE) if target else answer


def _cited_for(case: Case, prediction: Prediction) -> list[str] | None:
    """What each cited code stands for: the one structure that is asked for, or of several what the answer calls it."""
    if not case.mask_targets:
        return [case.target or "-"] * len(prediction.codes)
    names = {name.casefold(): name for name in case.mask_targets}
    phrases = [phrase for phrase in prediction.phrases if phrase is not None]
    if len(phrases) != len(prediction.codes):
        return None
    return [names.get(phrase.casefold(), phrase) for phrase in phrases]


def _code_scores(case: Case, prediction: Prediction) -> dict[str, Any]:
    from medsight.metrics.region_codes.region_codes import cited_right

    # Codes that the data set gives are what it asks for; without any, those of the codebook that the answer cites.
    known = prediction.reference_codes if case.codes is None else case.codes
    if known is not None and len(known) != len(case.masks):
        raise ValueError(f"prediction {case.id}: {len(known)} reference codes for {len(case.masks)} reference masks")
    exact, in_group = cited_right(prediction.codes, known or ()) or (None, None)
    return {
        "reference_codes": None if known is None else list(known),
        "reference_codes_from": None if known is None else "codebook" if case.codes is None else "data set",
        "code_accuracy": exact,
        "group_accuracy": in_group,
    }


def _mask_scores(case: Case, prediction: Prediction, protocol: Protocol, problems: Problems) -> dict[str, Any]:
    references = reference_masks(case)
    size = references[0].shape if references else read_picture(case.images[0]).size[::-1]
    placed = predicted_masks(prediction, size, problems)
    shown = list(placed.values())
    row: dict[str, Any] = {
        "n_masks": len(shown),
        "n_references": len(references),
        "no_region": not shown,
        "false_mask": case.absent and any(bool(mask.any()) for mask in shown),
        **dict.fromkeys(MASK_SCORES),
        "mask_refused": None,
    }
    if case.absent:
        return row
    if case.mask_targets:
        shown, references = by_name(placed, prediction.phrases, references, case.mask_targets)
    scores = score_item(shown, references, **vars(protocol.mask_protocol), spacing_mm=case.spacing_mm)
    return {**row, **{name: scores[name] for name in MASK_SCORES}, "mask_refused": scores["reason"]}
