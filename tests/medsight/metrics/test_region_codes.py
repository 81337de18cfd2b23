"""Purity, information, perplexity, rates: hand-worked, at their limits, and from a table of counts."""

import math
import random
from typing import Any

import numpy as np
import pytest

from medsight.metrics import load
from medsight.metrics.region_codes.region_codes import cited_right, code_usage


# Group 0: code 1 stands for the liver three times of four, code 2 twice for the spleen; group 3: one citation.
CITATIONS = (
    [("[C0_1]", "abdomen", "liver")] * 3
    + [("[C0_1]", "abdomen", "spleen")]
    + [("[C0_2]", "abdomen", "spleen")] * 2
    + [("[C3_0]", "brain", "tumor")]
)


def test_purity_information_and_perplexity_by_hand() -> None:
    usage = code_usage(CITATIONS, codes_per_group=4)
    group = usage["groups"]["abdomen"]
    h_codes = -(4 / 6 * math.log(4 / 6) + 2 / 6 * math.log(2 / 6))
    h_both = -(3 / 6 * math.log(3 / 6) + 1 / 6 * math.log(1 / 6) + 2 / 6 * math.log(2 / 6))
    information = h_codes + math.log(2) - h_both  # liver and spleen three times each
    assert group["citations"] == 6
    assert group["purity"] == (3 + 2) / 6
    assert group["nmi"] == pytest.approx(2 * information / (h_codes + math.log(2)), abs=1e-12)
    assert group["perplexity"] == pytest.approx(math.exp(h_codes), abs=1e-12)
    assert (group["live_codes"], group["live_share"]) == (2, 2 / 4)
    assert group["codes"]["[C0_1]"] == {"n": 4, "structures": {"liver": 3 / 4, "spleen": 1 / 4}}
    assert list(group["codes"]) == ["[C0_1]", "[C0_2]"]
    assert usage["purity"] == 6 / 7 and usage["purity_macro"] == (5 / 6 + 1) / 2
    assert usage["live_share_macro"] == (2 / 4 + 1 / 4) / 2
    assert usage["citations"] == 7


@pytest.mark.parametrize(
    ("pairs", "purity", "nmi"),
    [
        ([("a", "x"), ("b", "y")], 1.0, 1.0),  # each code its structure
        ([("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")], 0.5, 0.0),  # codes say nothing
        ([("a", "x"), ("a", "y")], 0.5, 0.0),  # one code for all
        ([("a", "x"), ("b", "x")], 1.0, 0.0),  # one structure
        ([("a", "x")], 1.0, 1.0),
    ],
)
def test_limits_of_purity_and_information(pairs: list[tuple[str, str]], purity: float, nmi: float) -> None:
    group = code_usage([(code, "g", structure) for code, structure in pairs])["groups"]["g"]
    assert group["purity"] == purity
    assert group["nmi"] == pytest.approx(nmi, abs=1e-12)
    assert group["live_share"] is None
    codes = {code for code, _ in pairs}
    assert group["perplexity"] == pytest.approx(len(codes))  # evenly used codes have their number


def test_a_group_that_is_never_cited_counts_as_dead() -> None:
    usage = code_usage([("[C0_0]", "CT", "liver")], {"CT": 2, "MR": 8})
    assert usage["groups"]["MR"]["live_share"] == 0.0
    assert usage["groups"]["MR"]["purity"] is None
    assert usage["live_share_macro"] == 1 / 4 and usage["purity_macro"] == 1.0


def test_answer_rates_by_hand() -> None:
    result = load("region_codes").compute(
        predictions=[["[C0_1]"], ["[C0_2]", "[C0_2]"], [], ["[C1_0]"], [], ["[C0_1]"]],
        references=[["[C0_1]"], ["[C0_2]", "[C0_3]"], ["[C0_1]"], None, [], []],
        absent=[False, False, False, False, True, True],
        reference_counts=[None, None, None, 2, None, None],
    )["answers"]
    assert (result["n_present"], result["no_code_rate"]) == (4, 1 / 4)
    assert (result["n_absent"], result["false_mask_rate"], result["no_region_rate"]) == (2, 1 / 2, 1 / 2)
    assert result["n_counted"] == 4
    assert (result["codes_per_answer"], result["references_per_answer"]) == ((1 + 2 + 0 + 1) / 4, (1 + 2 + 1 + 2) / 4)
    assert (result["count_exact"], result["count_error"]) == (2 / 4, (0 + 0 + 1 + 1) / 4)
    assert result["n_reference_codes"] == 4
    assert result["code_recall"] == (1 + 1 + 0) / 4  # the second C0_2 finds nothing more
    assert result["n_judged"] == 2  # the third answer cites nothing, the fourth has no reference codes
    assert result["code_accuracy"] == (1 + 1 / 2) / 2
    assert result["group_accuracy"] == (1 + 1) / 2
    assert result["codes_exact"] == 1 / 3
    nothing = load("region_codes").compute(predictions=[[], []], absent=[False, True])
    rates = [nothing["answers"][name] for name in ("no_code_rate", "false_mask_rate", "no_region_rate")]
    assert rates == [1.0, 0.0, 1.0] and nothing["usage"]["groups"] == {} and nothing["usage"]["purity"] is None


@pytest.mark.parametrize(
    ("codes", "right", "expected"),
    [
        (["[C0_1]"], ["[C0_1]"], (1.0, 1.0)),
        (["[C0_2]"], ["[C0_1]"], (0.0, 1.0)),
        (["[C1_1]"], ["[C0_1]"], (0.0, 0.0)),
        (["[C0_1]", "[C0_1]", "[C2_1]", "[C0_9]"], ["[C0_1]", "[C0_3]"], (1 / 4, 3 / 4)),
        (["[C0_1]", "[C0_1]"], ["[C0_1]", "[C0_1]"], (1.0, 1.0)),
        (["[SEG]"], ["[SEG]"], (1.0, 1.0)),
        ([], ["[C0_1]"], None),
        (["[C0_1]"], [], None),
    ],
)
def test_the_share_of_cited_codes_that_is_right(codes: list[str], right: list[str], expected: Any) -> None:
    assert cited_right(codes, right) == expected


def test_structures_follow_their_codes_and_groups_their_names() -> None:
    result = load("region_codes").compute(
        predictions=[["[C0_1]", "[C2_5]"], [], ["[C0_1]"]],
        structures=[["liver", "spleen"], [], None],
        codes_per_group=8,
    )["usage"]
    assert list(result["groups"]) == ["0", "2"]
    assert result["groups"]["0"]["codes"] == {"[C0_1]": {"n": 1, "structures": {"liver": 1.0}}}
    named = load("region_codes").compute(predictions=[["red"]], structures=[["liver"]], groups=[["abdomen"]])["usage"]
    assert named["groups"]["abdomen"]["codes"]["red"]["n"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"references": [[]]}, "number of predictions .2. and references .1."),
        ({"absent": [True]}, "number of predictions .2. and absent .1."),
        ({"structures": [["liver", "spleen"], []]}, "item 0: 2 structures for 1 codes"),
        ({"structures": ["liver", []]}, "structures: expected lists of str, got 'liver' in item 0"),
        ({"references": [["[C0_1]"], []], "absent": [True, False]}, "item 0: nothing is there to show"),
        ({"reference_counts": [1, 0], "absent": [True, False]}, "item 0: nothing is there to show"),
        ({"predictions": [["liver"], []], "structures": [["liver"], []]}, "'liver' is not a region code"),
        ({"structures": [["liver"], []], "codes_per_group": {"1": 4}}, "0 codes in group '0', of which 1 are cited"),
        ({"structures": [["liver"], []], "codes_per_group": 0}, "0 codes in group '0', of which 1 are cited"),
        (
            {"predictions": [["x"], ["x"]], "structures": [["a"], ["a"]], "groups": [["g"], ["h"]]},
            "code x is cited in two groups, 'g' and 'h'",
        ),
    ],
)
def test_bad_input_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("region_codes").compute(**({"predictions": [["[C0_1]"], []]} | given))


def entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def test_a_thousand_made_up_citations_agree_with_the_entropies_of_their_table() -> None:
    draw = random.Random(3)
    table, citations = np.zeros((8, 6)), []
    for _ in range(1000):
        code = draw.randint(0, 7)
        structure = code % 3 if draw.random() < 0.6 else draw.randint(0, 5)
        table[code, structure] += 1
        citations.append((f"[C0_{code}]", "g", str(structure)))
    h_codes, h_structures, h_both = (entropy(counts) for counts in (table.sum(1), table.sum(0), table.ravel()))
    group = code_usage(citations)["groups"]["g"]
    assert group["purity"] == table.max(1).sum() / 1000
    assert group["nmi"] == pytest.approx(2 * (h_codes + h_structures - h_both) / (h_codes + h_structures), abs=1e-12)
    assert group["perplexity"] == pytest.approx(math.exp(h_codes), abs=1e-9)
