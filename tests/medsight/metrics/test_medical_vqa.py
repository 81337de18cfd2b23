"""Each protocol against hand-worked answers, its quirks by name, and against a slow implementation of its own."""

import random
from typing import Any

import pytest

from medsight.metrics import load
from medsight.metrics.medical_vqa.answer_words import normalize, strict_words
from medsight.metrics.medical_vqa.medical_vqa import RefusedError, score_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two of ten, none", "2 of 10 0"),
        ("couldntve", "couldntve"),  # two apostrophes short: not in the list
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("t2-weighted - flair", "t2weighted flair"),
        ("1,200/day", "1200day"),
        (".5 cm, fig. 2", "5 cm fig 2"),
        ("e.g. liver", "eg liver"),
        ("." * 40 + "x", "x"),
        ("(a) or [an]?", "or"),
    ],
)
def test_llava_med_normalisation(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("protocol", "answer_type", "prediction", "reference", "expected"),
    [
        ("llava-med", "OPEN", "the left lung", "left lower lung", 2 / 3),
        ("llava-med", "OPEN", "lung lung lung", "left lung", 3 / 4),  # quirk: a repeated word raises recall
        ("llava-med", "OPEN", "left", "left left right", 1 / 2),  # quirk: found, a reference's word counts once
        ("llava-med", "CLOSED", "It looks normal.", "no", 1.0),  # quirk: no hits normal
        ("llava-med", "CLOSED", "left", "left", 0.0),  # quirk: an answer without the letters yes or no is wrong
        ("llava-med", "CLOSED", "yes and no", "no", 1.0),  # quirk: an answer with both is right
        ("llava-med", "CLOSED", "yes", "a", 1.0),  # quirk: a reference of articles is in every yes
        ("strict", "OPEN", "lung lung lung", "left lung", 1 / 2),  # repeating gains nothing
        ("strict", "OPEN", "left", "left left right", 1 / 3),
        ("strict", "CLOSED", "It looks normal.", "no", 0.0),  # whole words
        ("strict", "CLOSED", "No, it is normal.", "no", 1.0),
        ("strict", "CLOSED", "left", "left", 1.0),
        ("strict", "CLOSED", "upper left lobe", "left lobe", 1.0),
        ("strict", "CLOSED", "left upper lobe", "left lobe", 0.0),
        *((protocol, "CLOSED", "", "yes", 0.0) for protocol in ("llava-med", "strict")),  # nothing said is wrong
        *((protocol, "OPEN", "", "lung", 0.0) for protocol in ("llava-med", "strict")),
    ],
)
def test_answers_in_words(protocol: str, answer_type: str, prediction: str, reference: str, expected: float) -> None:
    assert score_answer(prediction, reference, answer_type, protocol=protocol) == pytest.approx(expected)


def test_strict_words_keep_decimals_and_thousands_and_split_the_rest() -> None:
    text = "The T2-weighted (3.5cm) 1,200 left,right can\u2019t dont"
    assert strict_words(text) == ["t2", "weighted", "3.5", "cm", "1200", "left", "right", "can't", "don't"]


ORGANS = ["Liver", "Lung", "Kidney"]


@pytest.mark.parametrize(
    ("reference", "options", "right", "wrong"),
    [
        ("Lung", ORGANS, ("Lung", "lung cancer", "The answer is: Lung."), ("Liver", "Liv", "xyz", "")),
        ("Lung", ["LUNG opacity", "Lung"], (), ("LUNG",)),  # quirk: case counts
        ("ax", ["ax", "bx"], ("ab",), ()),  # quirk: the first wins a tie
        ("bx", ["ax", "bx"], (), ("ab",)),
    ],
)
def test_multiple_choice_takes_the_most_similar_option(
    reference: str, options: list[str], right: tuple[str, ...], wrong: tuple[str, ...]
) -> None:
    for answers, expected in ((right, 1.0), (wrong, 0.0)):
        for answer in answers:
            assert score_answer(answer, reference, "CLOSED", options, "multiple-choice") == expected, answer


PLACES = ["upper left", "left", "right", "T1-weighted MRI", "MRI"]


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("left", ("Left.", "at the left"), ("upper left", "left or right", "leftmost", "")),
        ("upper left", ("It lies in the UPPER, left part.",), ("upper right", "left", "upper left and left")),
        ("MRI", ("an MRI",), ("a T1-weighted MRI", "CT")),
    ],
)
def test_of_a_closed_set_an_answer_names_the_right_one_and_no_other(
    reference: str, right: tuple[str, ...], wrong: tuple[str, ...]
) -> None:
    for answers, expected in ((right, 1.0), (wrong, 0.0)):
        for answer in answers:
            assert score_answer(answer, reference, "CLOSED", PLACES, "closed-set") == expected, answer


@pytest.mark.parametrize("reference", ["B", "Lung"])
def test_first_letter_takes_the_first_allowed_letter(reference: str) -> None:
    right = ("B", "b.", "(B) Lung", "Answer: B, not C", "E or B")  # E is not allowed with three options
    wrong = ("Answer: C, not B", "Because a lung is seen", "A", "")
    for answers, expected in ((right, 1.0), (wrong, 0.0)):
        for answer in answers:
            assert score_answer(answer, reference, "CLOSED", ORGANS, "first-letter") == expected, answer


@pytest.mark.parametrize(
    ("protocol", "prediction", "reference", "options", "reason"),
    [
        ("strict", "Yes. No.", "yes", None, "both yes and no"),
        ("strict", "left", "the", None, "no word"),
        ("first-letter", "B", "B", None, "no options"),
        ("multiple-choice", "B", "B", [], "no options"),
        ("first-letter", "B", "D", ["x", "y"], "neither an allowed letter nor an option"),
        ("multiple-choice", "x", "z", ["x", "y"], "like none"),
        ("closed-set", "x", "z", ["x", "y"], "none of the options"),
    ],
)
def test_what_a_protocol_cannot_score_is_refused(
    protocol: str, prediction: str, reference: str, options: Any, reason: str
) -> None:
    with pytest.raises(RefusedError, match=reason):
        score_answer(prediction, reference, "CLOSED", options, protocol)
    if protocol == "strict" and reference == "the":
        with pytest.raises(RefusedError, match=reason):
            score_answer(prediction, reference, "OPEN", options, protocol)


def test_the_result_counts_means_groups_and_refusals() -> None:
    result = load("medical_vqa").compute(
        predictions=["yes", "yes no", "no", "lung", "left"],
        references=["yes", "yes", "yes", "left lung", "left"],
        answer_types=["CLOSED", "CLOSED", "CLOSED", "OPEN", "OPEN"],
        groups=["CT", "CT", "CT", "CT", "MR"],
        protocol="strict",
    )
    assert result["scores"] == [1.0, None, 0.0, 0.5, 1.0]
    assert result["reasons"] == [None, "the answer holds both yes and no", None, None, None]
    assert result["counts"] == {"closed": 3, "open": 2}
    assert (result["scored"], result["refused"]) == (4, 1)
    assert result["refusals"] == {"the answer holds both yes and no": 1}
    assert (result["closed_accuracy"], result["open_recall"], result["overall"]) == (1 / 2, 3 / 4, 2.5 / 4)
    assert result["refused_as_wrong"] == {"closed_accuracy": 1 / 3, "open_recall": 3 / 4, "overall": 2.5 / 5}
    assert result["groups"]["CT"] == {"n": 4, "score": 0.5, "refused": 1}
    assert result["macro"] == (0.5 + 1.0) / 2
    assert result["protocol"] == "strict"
    result = load("medical_vqa").compute(predictions=["yes"], references=["yes"], answer_types=["CLOSED"])
    assert result["open_recall"] is None and result["macro"] is None and result["groups"] == {}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"references": ["yes"]}, "number of predictions .2. and references .1."),
        ({"answer_types": ["CLOSED"]}, "number of predictions .2. and answer_types .1."),
        ({"answer_types": ["CLOSED", "closed"]}, "item 1: answer type 'closed': expected CLOSED or OPEN"),
        ({"answer_types": None}, "item 0: answer type '': expected CLOSED or OPEN"),
        ({"protocol": "vqav2"}, "protocol 'vqav2': choose one of llava-med, strict, closed-set, "),
        ({"predictions": ["yes", None]}, "predictions: expected str, got None in item 1"),
    ],
)
def test_bad_input_is_refused(changed: dict[str, Any], message: str) -> None:
    given = {"predictions": ["yes", "no"], "references": ["yes", "no"], "answer_types": ["CLOSED", "CLOSED"]}
    with pytest.raises(ValueError, match=message):
        load("medical_vqa").compute(**(given | changed))


def slow_normalise(text: str) -> str:
    """The normalisation once more, a character at a time."""
    lowered = text.lower()
    thousands = False
    for i in range(1, len(lowered) - 1):
        thousands = thousands or (lowered[i] == "," and lowered[i - 1].isdigit() and lowered[i + 1].isdigit())
    touching = set()
    for i, character in enumerate(lowered):
        if (i > 0 and lowered[i - 1] == " ") or (i + 1 < len(lowered) and lowered[i + 1] == " "):
            touching.add(character)
    without_marks = ""
    for character in lowered:
        if character in ';/[]"{}()=+\\_-><@`,?!':
            without_marks += "" if thousands or character in touching else " "
        else:
            without_marks += character
    without_stops = ""
    for i, character in enumerate(without_marks):
        between = 0 < i < len(without_marks) - 1 and without_marks[i - 1].isdigit() and without_marks[i + 1].isdigit()
        if character != "." or between:
            without_stops += character
    known = {"none": "0", "zero": "0", "one": "1", "two": "2", "ten": "10"}
    words = []
    for word in without_stops.split():
        word = known.get(word, word)
        if word in ("a", "an", "the"):
            continue
        words.append({"isnt": "isn't", "dont": "don't"}.get(word, word))
    return " ".join(words)


def slow_score(prediction: str, reference: str, answer_type: str) -> float:
    answer, right = slow_normalise(prediction), slow_normalise(reference)
    if answer_type == "CLOSED":
        holds = {answer[i : i + n] for n in (2, 3, len(right)) for i in range(len(answer) - n + 1)}
        return 1.0 if ("yes" in holds or "no" in holds) and right in holds else 0.0
    said, wanted = answer.split(), right.split()
    hits = 0
    for word in said:
        if word in wanted:
            hits += 1
    misses = 0
    for word in wanted:
        if word not in said:
            misses += 1
    return hits / (hits + misses) if hits else 0.0


def test_a_thousand_made_up_answers_score_as_a_slow_implementation_scores_them() -> None:
    draw = random.Random(4)
    words = "yes no normal know left Left lung a the two none isnt dont 3.5 1,200 t2-weighted . , ( ) / ?".split()

    def text(longest: int) -> str:
        parts = (draw.choice(words) + draw.choice(["", " ", " "]) for _ in range(draw.randint(0, longest)))
        return "".join(parts) + draw.choice(["", "."])

    predictions = [text(14) for _ in range(1000)]
    kinds = [draw.choice(["CLOSED", "OPEN"]) for _ in range(1000)]
    references = [draw.choice(["yes", "no", "left"]) if kind == "CLOSED" else text(8) for kind in kinds]
    expected = [slow_score(*row) for row in zip(predictions, references, kinds, strict=True)]
    result = load("medical_vqa").compute(predictions=predictions, references=references, answer_types=kinds)
    assert result["scores"] == expected
    assert len(set(expected)) > 10
    assert result["overall"] == sum(expected) / 1000
