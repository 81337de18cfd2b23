"""Answers to medical visual questions, scored by named protocols.

Sources: LLaVA-Med (Li et al., 2023, arXiv 2306.00890; `llava/eval`), whose numbers MedSIGHT and MedPLIB follow;
OmniMedVQA (Hu et al., 2024, arXiv 2402.09181); MMMU (Yue et al., 2024, arXiv 2311.16502).
"""

import re
from collections import Counter
from difflib import SequenceMatcher
from string import ascii_uppercase
from typing import Any

import datasets
import evaluate

from .answer_words import normalize, strict_words


CLOSED, OPEN = "CLOSED", "OPEN"

DESCRIPTION = """\
Scores answers to medical visual questions: accuracy of closed questions, recall of open ones, by a named protocol."""
INPUTS = """
Args:
    predictions: list of str, the answers.
    references: list of str, the right answers; for `first-letter` the letter, or the option itself.
    answer_types: list of "CLOSED" or "OPEN"; all closed where left out under a protocol of choices.
    options: list of lists of str (or None), what could be chosen from; needed by the protocols of choices.
    groups: list of str, such as the modality; adds a mean a group and the unweighted mean over groups.
    protocol: "llava-med" (default), "strict", "closed-set", "multiple-choice" or "first-letter".
Returns:
    protocol; closed_accuracy, open_recall, overall and macro, each from 0 to 1 over the scored items, None where there
    are none; counts {closed, open}; scored; refused, refusals {reason: count}, refused_as_wrong; groups {name: {n,
    score, refused}}; scores and reasons, a float or else a str an item.
Examples:
    >>> metric = evaluate.load("medsight/metrics/medical_vqa")
    >>> metric.compute(predictions=["Yes, it is."], references=["yes"], answer_types=["CLOSED"])["closed_accuracy"]
    1.0
"""
CITATION = """\
@inproceedings{li2023llavamed,
  title={LLaVA-Med: Training a Large Language-and-Vision Assistant for Biomedicine in One Day},
  author={Li, Chunyuan and Wong, Cliff and Zhang, Sheng and Usuyama, Naoto and Liu, Haotian and Yang, Jianwei and
    Naumann, Tristan and Poon, Hoifung and Gao, Jianfeng},
  booktitle={Advances in Neural Information Processing Systems}, year={2023}}
"""


class RefusedError(ValueError):
    """An item that its protocol cannot score; the message is the reason."""


def llava_med_open(prediction: str, reference: str) -> float:
    """Recall over bags of words, TP / (TP + FN); 0 where either has no word. Repeating a right word raises the score.

    TP counts the *prediction's* occurrences of words that also stand in the reference, FN the reference's occurrences
    of words absent from the prediction.
    """
    predicted = Counter(normalize(prediction).split())
    wanted = Counter(normalize(reference).split())
    hits = sum(count for word, count in predicted.items() if word in wanted)
    misses = sum(count for word, count in wanted.items() if word not in predicted)
    return hits / (hits + misses) if hits else 0.0


def llava_med_closed(prediction: str, reference: str) -> float:
    """1 if the normalised prediction holds the letters "yes" or "no", and the normalised reference as a substring.

    So "no" is found in "normal", and an answer such as "left" is wrong even where it is the reference. A wrong answer
    stays in the mean: left out, it would count for the system.
    """
    answer = normalize(prediction)
    return float(("yes" in answer or "no" in answer) and normalize(reference) in answer)


def strict_open(prediction: str, reference: str) -> float:
    """Recall over bags of words with the reference's counts, sum of min(answer, reference) over the reference's."""
    predicted, wanted = Counter(strict_words(prediction)), Counter(strict_words(reference))
    if not wanted:
        raise RefusedError("the reference has no word")
    return sum((predicted & wanted).values()) / sum(wanted.values())


def strict_closed(prediction: str, reference: str) -> float:
    """1 if the reference's words stand in the prediction as whole words, one after the other."""
    predicted, wanted = strict_words(prediction), strict_words(reference)
    if not wanted:
        raise RefusedError("the reference has no word")
    if wanted in (["yes"], ["no"]) and "yes" in predicted and "no" in predicted:
        raise RefusedError("the answer holds both yes and no")
    return float(any(predicted[i : i + len(wanted)] == wanted for i in range(len(predicted))))


def closed_set(prediction: str, reference: str, options: list[str]) -> float:
    """1 if the answer names the reference and none of the other options, as whole words.

    At each place the longest option counts: "upper left" does not name "left".
    """
    words = [" ".join(strict_words(option)) for option in options]
    right = " ".join(strict_words(reference))
    if right not in words:
        raise RefusedError("the reference is none of the options")
    longest_first = "|".join(re.escape(option) for option in sorted(words, key=len, reverse=True))
    return float(set(re.findall(rf"\b(?:{longest_first})\b", " ".join(strict_words(prediction)))) == {right})


def multiple_choice(prediction: str, reference: str, options: list[str]) -> float:
    """1 if prediction and reference are most like the same option, by `difflib.SequenceMatcher(option, text).ratio()`.

    Case counts, the first option wins a tie, an answer like none of them is wrong (OmniMedVQA).
    """
    right = _most_similar(options, reference)
    if right is None:
        raise RefusedError("the reference is like none of the options")
    return float(_most_similar(options, prediction) == right)


def first_letter(prediction: str, reference: str, options: list[str]) -> float:
    """1 if the first allowed letter is the reference's (MMMU): A for the first option, B for the second, and so on.

    A letter counts where it is a capital and stands alone ("B", "(B)", "Answer: B."), or is all that the answer holds;
    an answer without one is wrong.
    """
    allowed = ascii_uppercase[: len(options)]
    right = reference.strip()
    if len(right) != 1 or right not in allowed:
        if reference not in options:
            raise RefusedError("the reference is neither an allowed letter nor an option")
        right = ascii_uppercase[options.index(reference)]
    words = "".join(character if character.isalnum() else " " for character in prediction).split()
    if len(words) == 1:
        words = [words[0].upper()]
    return float(next((word for word in words if len(word) == 1 and word in allowed), None) == right)


def _most_similar(options: list[str], text: str) -> int | None:
    ratios = [SequenceMatcher(None, option, text).ratio() for option in options]
    return ratios.index(max(ratios)) if max(ratios) > 0 else None


WORD_PROTOCOLS = {
    "llava-med": {CLOSED: llava_med_closed, OPEN: llava_med_open},
    "strict": {CLOSED: strict_closed, OPEN: strict_open},
}
CHOICE_PROTOCOLS = {"closed-set": closed_set, "multiple-choice": multiple_choice, "first-letter": first_letter}
OPTIONAL = {"answer_types": "", "options": None, "groups": ""}
PROTOCOLS = (*WORD_PROTOCOLS, *CHOICE_PROTOCOLS)


def score_answer(
    prediction: str, reference: str, answer_type: str, options: list[str] | None = None, protocol: str = "llava-med"
) -> float:
    """The score of one answer, from 0 to 1.

    Raises:
        RefusedError: the protocol cannot score it.
        ValueError: the protocol or the answer type is unknown.
    """
    if answer_type not in (CLOSED, OPEN):
        raise ValueError(f"answer type {answer_type!r}: expected CLOSED or OPEN")
    if protocol in CHOICE_PROTOCOLS:
        if not options:
            raise RefusedError("no options to choose from")
        return CHOICE_PROTOCOLS[protocol](prediction, reference, options)
    if protocol in WORD_PROTOCOLS:
        return WORD_PROTOCOLS[protocol][answer_type](prediction, reference)
    raise ValueError(f"protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")


def _mean(scores: list[float]) -> float | None:
    return sum(scores) / len(scores) if scores else None


def _by_type(scores: list[tuple[str, float]]) -> dict[str, float | None]:
    kinds = {"closed_accuracy": (CLOSED,), "open_recall": (OPEN,), "overall": (CLOSED, OPEN)}
    return {name: _mean([score for kind, score in scores if kind in wanted]) for name, wanted in kinds.items()}


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class MedicalVqa(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    **dict.fromkeys(("predictions", "references", "answer_types", "groups"), text),
                    "options": datasets.Sequence(text),
                }
            ),
        )

    def add_batch(self, *, predictions: list[str], references: list[str], **optional: Any) -> None:
        """Add a batch of answers, with answer_types, options and groups where the protocol needs them.

        Raises:
            ValueError: the inputs are of unequal lengths, or not text.
        """
        columns = {"predictions": predictions, "references": references, **optional}
        for name, absent in OPTIONAL.items():
            if columns.get(name) is None:
                columns[name] = [absent] * len(predictions)
        for name in ("predictions", "references", "answer_types", "groups"):
            for i, value in enumerate(columns[name]):
                if not isinstance(value, str):
                    raise ValueError(f"{name}: expected str, got {value!r} in item {i}")
        evaluate.Metric.add_batch(self, **columns)

    def compute(self, *, protocol: str = "llava-med", **batch: Any) -> dict[str, Any]:
        """Score the answers of a batch given here, or added before; ValueError where they cannot be scored."""
        if batch.get("predictions") is not None:
            self.add_batch(**batch)
        if len(self) == 0:
            raise ValueError("no answers to score: add some, or pass predictions and references")
        return evaluate.Metric.compute(self, protocol=protocol)

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        answer_types: list[str],
        options: list[list[str] | None],
        groups: list[str],
        protocol: str,
    ) -> dict[str, Any]:
        scores: list[float | None] = []
        reasons: list[str | None] = []
        kinds = [kind or (CLOSED if protocol in CHOICE_PROTOCOLS else "") for kind in answer_types]
        for i, row in enumerate(zip(predictions, references, kinds, options, strict=True)):
            score, reason = None, None
            try:
                score = score_answer(*row, protocol=protocol)
            except RefusedError as refusal:
                reason = str(refusal)
            except ValueError as error:
                raise ValueError(f"item {i}: {error}") from error
            scores.append(score)
            reasons.append(reason)
        scored = [(kind, score) for kind, score in zip(kinds, scores, strict=True) if score is not None]
        by_group: dict[str, dict[str, Any]] = {}
        for name in sorted(set(groups) - {""}):
            inside = [score for group, score in zip(groups, scores, strict=True) if group == name]
            known = [score for score in inside if score is not None]
            by_group[name] = {"n": len(inside), "score": _mean(known), "refused": len(inside) - len(known)}
        return {
            "protocol": protocol,
            **_by_type(scored),
            "macro": _mean([group["score"] for group in by_group.values() if group["score"] is not None]),
            "counts": {"closed": kinds.count(CLOSED), "open": kinds.count(OPEN)},
            "scored": len(scored),
            "refused": len(scores) - len(scored),
            "refusals": dict(Counter(reason for reason in reasons if reason is not None)),
            "refused_as_wrong": _by_type([(kind, score or 0.0) for kind, score in zip(kinds, scores, strict=True)]),
            "groups": by_group,
            "scores": scores,
            "reasons": reasons,
        }
