"""What region codes stand for, and how often they are missing, false or wrong.

Sources: purity and normalised mutual information as in Manning, Raghavan and Schütze, *Introduction to Information
Retrieval* (2008), section 16.3, with the arithmetic mean of the entropies; perplexity and live share of a codebook as
in VQ-VAE (van den Oord et al., 2017, arXiv 1711.00937) and after; region codes as in MedSIGHT (arXiv 2606.06760,
ICML 2026).
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate


KNOWN = ("references", "reference_counts", "absent", "structures", "groups")
CODE = re.compile(r"\[C(0|[1-9][0-9]*)_(0|[1-9][0-9]*)\]")

DESCRIPTION = """\
Describes the region codes of answers: what each code stands for, how much of the codebook is used, and how often codes
are missing, false or wrong."""
INPUTS = """
Args:
    predictions: list of lists of str, the codes that each answer cites, such as "[C0_16]"; an empty list where none.
    references: list of lists of str (or None), the right codes, where they are known; empty where nothing is to show.
    reference_counts: list of int (or None), how many regions there are to show; by default the number of references.
    absent: list of bool, whether the question is about something that the image does not show; all False by default.
    structures: list of lists of str (or None), what each cited code was cited for.
    groups: list of lists of str (or None), the group's name of each cited code; "0" for "[C0_16]" by default.
    codes_per_group: int, or {group name: int}, the codebook's size; needed for the live share.
Returns:
    answers: see `answer_rates`; usage: see `code_usage`, over the answers that have structures.
Examples:
    >>> metric = evaluate.load("medsight/metrics/region_codes")
    >>> result = metric.compute(predictions=[["[C0_1]"], []], structures=[["liver"], []], absent=[False, True])
    >>> result["answers"]["false_mask_rate"], result["usage"]["groups"]["0"]["codes"]["[C0_1]"]["structures"]
    (0.0, {'liver': 1.0})
"""
CITATION = """\
@inproceedings{medsight2026,
  title={MedSIGHT}, booktitle={International Conference on Machine Learning}, year={2026}, note={arXiv:2606.06760}}
"""


def group_of(code: str) -> str:
    """The group's number in a code's spelling, "0" for `[C0_16]` and for `[SEG]`; ValueError for anything else."""
    match = CODE.fullmatch(code)
    if match is None and code != "[SEG]":
        raise ValueError(f"{code!r} is not a region code: expected [C<group>_<index>] or [SEG], or a name in groups")
    return match[1] if match else "0"


def entropy(counts: list[int]) -> float:
    """Entropy of a histogram in nats, -sum p log p."""
    total = sum(counts)
    return -sum(count / total * math.log(count / total) for count in counts if count)


def purity(table: Counter[tuple[str, str]]) -> float:
    """Share of citations whose structure is their code's most frequent one: 1/N sum over codes of the largest."""
    codes = _margins(table)[0]
    best = [max(count for (other, _), count in table.items() if other == code) for code in codes]
    return sum(best) / sum(table.values())


def normalized_mutual_information(table: Counter[tuple[str, str]]) -> float:
    """2 I(code; structure) / (H(code) + H(structure)); 1 where there is one code and one structure.

    I = H(code) + H(structure) - H(code, structure).
    """
    codes, structures = _margins(table)
    both = entropy(list(codes.values())) + entropy(list(structures.values()))
    return 1.0 if both == 0 else max(0.0, 2 * (both - entropy(list(table.values()))) / both)


def code_usage(
    citations: list[tuple[str, str, str]], codes_per_group: int | dict[str, int] | None = None
) -> dict[str, Any]:
    """What codes stand for.

    Args:
        citations: (code, group's name, structure) of each cited code.
        codes_per_group: size of each group's codebook; groups that a mapping names are listed even if never cited.

    Returns:
        `groups` {name: citations, purity, nmi, perplexity, live_codes, live_share, codes {code: {n, structures {name:
        share}}}}, the most frequent codes and structures first; `citations` and `purity` over all; and the unweighted
        means over groups `purity_macro`, `nmi_macro`, `perplexity_macro`, `live_share_macro`. The card says what each
        is; None stands for a mean over nothing, and for a share of a codebook of unknown size.

    Raises:
        ValueError: a code is cited in two groups, a group has more codes than its codebook, or is not in the mapping.
    """
    owner: dict[str, str] = {}
    tables: defaultdict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    if isinstance(codes_per_group, dict):
        tables |= {name: Counter() for name in codes_per_group}
    for code, group, structure in citations:
        if owner.setdefault(code, group) != group:
            raise ValueError(f"code {code} is cited in two groups, {owner[code]!r} and {group!r}")
        tables[group][code, structure] += 1
    groups = {name: _group_usage(name, tables[name], codes_per_group) for name in sorted(tables)}
    everything = sum((table for table in tables.values()), Counter[tuple[str, str]]())
    return {
        "groups": groups,
        "citations": len(citations),
        "purity": purity(everything) if everything else None,
        **{
            f"{name}_macro": _mean([group[name] for group in groups.values() if group[name] is not None])
            for name in ("purity", "nmi", "perplexity", "live_share")
        },
    }


def _group_usage(
    name: str, table: Counter[tuple[str, str]], codes_per_group: int | dict[str, int] | None
) -> dict[str, Any]:
    codes = _margins(table)[0]
    size = codes_per_group.get(name, 0) if isinstance(codes_per_group, dict) else codes_per_group
    if isinstance(size, int) and (size < 1 or len(codes) > size):
        raise ValueError(f"codes_per_group: {size} codes in group {name!r}, of which {len(codes)} are cited")
    meanings: dict[str, Any] = {}
    for code, n in _descending(codes):
        cited = Counter({structure: count for (other, structure), count in table.items() if other == code})
        meanings[code] = {"n": n, "structures": {structure: count / n for structure, count in _descending(cited)}}
    return {
        "citations": sum(table.values()),
        "purity": purity(table) if table else None,
        "nmi": normalized_mutual_information(table) if table else None,
        "perplexity": math.exp(entropy(list(codes.values()))) if table else None,
        "live_codes": len(codes),
        "live_share": len(codes) / size if isinstance(size, int) else None,
        "codes": meanings,
    }


def cited_right(codes: Sequence[str], right: Sequence[str]) -> tuple[float, float] | None:
    """Shares of an answer's codes that are among the reference codes, and whose group is one of theirs.

    Each reference code makes one citation right, so a repeated one has to be cited as often. None where the answer
    cites no code or there is no reference code; ValueError where one is no region code.
    """
    if not codes or not right:
        return None
    groups = {group_of(code) for code in right}
    return _common(codes, right) / len(codes), sum(group_of(code) in groups for code in codes) / len(codes)


def answer_rates(
    predicted: list[list[str]],
    references: list[list[str] | None],
    absent: list[bool],
    reference_counts: list[int | None] | None = None,
) -> dict[str, Any]:
    """How often codes are missing, false or wrong.

    Returns:
        The rates of the metric's card, each with the number that it is over; None stands for a mean over nothing.

    Raises:
        ValueError: the lists differ in length, or an absent thing has reference codes or a count.
    """
    counts = reference_counts or [None] * len(predicted)
    numbers: list[tuple[int, int]] = []
    matched: list[tuple[int, int, bool]] = []
    judged: list[tuple[float, float]] = []
    for i, (codes, right, gone, count) in enumerate(zip(predicted, references, absent, counts, strict=True)):
        if gone:
            if right or count:
                raise ValueError(f"item {i}: nothing is there to show, yet it has reference codes or a count")
            continue
        if count is not None or right is not None:
            numbers.append((len(codes), len(right or ()) if count is None else count))
        if right:
            hits = _common(codes, right)
            matched.append((len(right), hits, hits == len(right) == len(codes)))
            if (shares := cited_right(codes, right)) is not None:
                judged.append(shares)
    present = [codes for codes, gone in zip(predicted, absent, strict=True) if not gone]
    false = [float(bool(codes)) for codes, gone in zip(predicted, absent, strict=True) if gone]
    total = sum(n for n, _, _ in matched)
    return {
        "n_present": len(present),
        "no_code_rate": _mean([float(not codes) for codes in present]),
        "n_absent": len(false),
        "false_mask_rate": _mean(false),
        "no_region_rate": _mean([1 - rate for rate in false]),
        "n_counted": len(numbers),
        "codes_per_answer": _mean([n for n, _ in numbers]),
        "references_per_answer": _mean([n for _, n in numbers]),
        "count_exact": _mean([float(a == b) for a, b in numbers]),
        "count_error": _mean([abs(a - b) for a, b in numbers]),
        "n_judged": len(judged),
        "code_accuracy": _mean([exact for exact, _ in judged]),
        "group_accuracy": _mean([group for _, group in judged]),
        "n_reference_codes": total,
        "code_recall": sum(hits for _, hits, _ in matched) / total if total else None,
        "codes_exact": _mean([float(exact) for *_, exact in matched]),
    }


def _margins(table: Counter[tuple[str, str]]) -> tuple[Counter[str], Counter[str]]:
    cited = list(table.elements())
    return Counter(code for code, _ in cited), Counter(structure for _, structure in cited)


def _descending(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))


def _common(predicted: Sequence[str], right: Sequence[str]) -> int:
    return sum((Counter(predicted) & Counter(right)).values())


def _mean(values: list[Any]) -> float | None:
    return sum(values) / len(values) if values else None


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class RegionCodes(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        codes = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    **dict.fromkeys(("predictions", "references", "structures", "groups"), codes),
                    "reference_counts": datasets.Value("int64"),
                    "absent": datasets.Value("bool"),
                }
            ),
        )

    def add_batch(self, *, predictions: list[list[str]], **known: Any) -> None:
        """Add a batch of answers' codes, and what is known of them.

        Raises:
            ValueError: the inputs are of unequal lengths, or not codes.
        """
        columns = {"predictions": predictions, **known}
        for name in KNOWN:
            if columns.get(name) is None:
                columns[name] = [False if name == "absent" else None] * len(predictions)
        for name in ("predictions", "references", "structures", "groups"):
            for i, texts in enumerate(columns[name]):
                if texts is None and name != "predictions":
                    continue
                if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
                    raise ValueError(f"{name}: expected lists of str, got {texts!r} in item {i}")
                if name in ("structures", "groups") and len(texts) != len(predictions[i]):
                    raise ValueError(f"item {i}: {len(texts)} {name} for {len(predictions[i])} codes")
        evaluate.Metric.add_batch(self, **columns)

    def compute(
        self, *, codes_per_group: int | dict[str, int] | None = None, predictions: Any = None, **known: Any
    ) -> dict[str, Any]:
        """Rates and usage of the codes given here, or added before; ValueError where they contradict themselves."""
        if predictions is not None:
            self.add_batch(predictions=predictions, **known)
        if len(self) == 0:
            raise ValueError("no answers: add some, or pass predictions")
        return evaluate.Metric.compute(self, codes_per_group=codes_per_group)

    def _compute(
        self,
        predictions: list[list[str]],
        references: list[list[str] | None],
        reference_counts: list[int | None],
        absent: list[bool],
        structures: list[list[str] | None],
        groups: list[list[str] | None],
        codes_per_group: int | dict[str, int] | None,
    ) -> dict[str, Any]:
        citations = [
            citation
            for codes, named, owners in zip(predictions, structures, groups, strict=True)
            if named is not None
            for citation in zip(codes, owners or [group_of(code) for code in codes], named, strict=True)
        ]
        return {
            "answers": answer_rates(predictions, references, absent, reference_counts),
            "usage": code_usage(citations, codes_per_group),
        }
