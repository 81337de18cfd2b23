"""An answer with region codes, taken apart: clean text, and for every code the words that it stands for.

Phrases are found by rule, not by a parser: a code stands for the noun phrase that ends right before it, once the words
that only announce the code ("is segmented as", "is here:") are set aside; codes in a row share it; where nothing
stands before a code in its sentence, the noun phrase right after it counts ("[C0_16] liver"). A phrase never reaches
over the end of a sentence or over another code. Where no rule fits, a code has no phrase.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .region_codes_medsight import CodeMeaning


CODE = "\ufffc"  # stands for one region code while an answer is taken apart: Unicode's object replacement character

# Spaces are counted everywhere: an answer of nothing but spaces must not make a pattern quadratic.
_GAP = r"(?:[\s,;&]|\band\b|\bor\b){0,8}"
_RUN = re.compile(rf"{CODE}(?:{_GAP}{CODE})*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")
_WORD = r"[^\W_]+(?:[-'’/+.][^\W_]+)*%?"
_SHOWN = (
    "segmented|shown|marked|outlined|highlighted|delineated|depicted|indicated|labelled|labeled|annotated|denoted|localized|"
    "localised|located|given|seen|visible|found|identified|noted|detected|observed|evident|present|demonstrated|displayed"
)
_BE = "is|are|was|were|be|been|being|can|could|may|has|have|had|appears?|lies?"
# "..., segmented as", "is located at", "is here", "are present": announces a code or closes a clause; names nothing.
_TAIL = re.compile(
    rf"[\s,;]*(?:\b(?:and|which|that|{_BE}|also|clearly|here|below|there)\s+)*"
    rf"\b(?:{_SHOWN}|here|below|as|at|see|{_BE})(?:\s+(?:here|below|too|as well|as|at|by|in|on|with|via))*$",
    flags=re.IGNORECASE,
)
_CLOSING = re.compile(r"(?:[\s:,;(\[{*_`\"'“”‘’=>–—-]|(?<=\S)\s*\([^()]*\)\s*$)+$")
_STOP_WORDS = frozenset(
    """
    a an the this that these those some any no each every both all another other its their his her my your our
    one two three four five six seven eight nine ten several multiple many few
    is are was were be been being am do does did has have had can could may might will would should must
    there here it they he she i we you yes not also likely probably possibly clearly only just below above
    show shows showing shown see seen reveal reveals revealing demonstrate demonstrates demonstrating depict depicts
    depicting contain contains containing include includes including indicate indicates indicating suggest suggests
    suggesting identify identified detect detected found noted visible present observed appear appears located segment
    segments segmented segmenting mark marked outline outlined highlight highlighted
    and or but nor while plus versus vs than then so because if when where which who whose what
    with without on at by for from to into onto as near within between among over under via per about consistent
    """.split()
)
# Words that name what an answer is made of; alone they say nothing of what a code shows.
_GENERIC = frozenset(
    """
    answer area areas code codes finding findings image mask masks outline output picture region regions result results
    scan segmentation segmentations structure structures
    """.split()
)
_INNER = frozenset(("of", "in"))
_ARTICLES = frozenset(("the", "a", "an"))
_LONGEST_PHRASE = 8  # words
_REACH = 400  # characters before a code that are looked at


@dataclass(frozen=True, eq=False)
class GroundedRegion:
    """One region code of an answer and what it stands for. An example stands at [`GroundedAnswer`].

    Attributes:
        code: the token, as `[C0_16]`.
        token_id: its id in the vocabulary.
        group, code_index: k and m, counted from 0.
        group_name: the group's name, where the processor knows names.
        phrase: the words of the answer that the code stands for; `None` where no rule finds any.
        span: (start, end) of the phrase in `GroundedAnswer.text`.
        image_index: which of the row's own images, counted from 0; `None` where no image stands before the code.
        mask: (height, width) bool at the image's own size; `None` without an image.
        box: (x0, y0, x1, y1) in pixels, the end excluded; `None` where the mask is empty.
        area: pixels inside the mask.
        score: the model's confidence in the mask, in [0, 1]; `None` where it gave none.
        meaning: what the code usually stands for, whatever the answer says; `None` where the checkpoint does not tell.
    """

    code: str
    token_id: int
    group: int
    code_index: int
    group_name: str | None
    phrase: str | None
    span: tuple[int, int] | None
    image_index: int | None
    mask: torch.Tensor | None
    box: tuple[int, int, int, int] | None
    area: int
    score: float | None
    meaning: CodeMeaning | None = None


@dataclass(frozen=True, eq=False)
class GroundedAnswer:
    """One generated answer.

    Attributes:
        text: the answer without its codes, spaces and punctuation tidied.
        raw_text: the answer as generated, codes included.
        regions: an entry a code, in the order of the text.
        is_complete: whether the model came to an end; False where a limit of length or a stop of the user cut the
            answer; `None` for a text that `generate` did not write.

    Example, in a checkout:

    ```python
    from processing_medsight import MedSightProcessor

    processor = MedSightProcessor.from_pretrained("medsight/medsight-nano")
    inputs = processor(text="The liver [C0_1] is large.", return_tensors="pt")
    (answer,) = processor.post_process_grounded_answer({}, inputs)
    assert answer.text == "The liver is large."
    assert [(region.code, region.phrase) for region in answer.regions] == [("[C0_1]", "liver")]
    ```
    """

    text: str
    raw_text: str
    regions: list[GroundedRegion] = field(default_factory=list)
    is_complete: bool | None = None


def mask_box(mask: torch.Tensor) -> tuple[int, int, int, int] | None:
    """(x0, y0, x1, y1) in pixels, the end excluded, around a (height, width) bool mask; `None` if it is empty."""
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def tidy_answer(pieces: Sequence[str]) -> tuple[str, list[tuple[int, int] | None]]:
    """Clean text of an answer and the place of each code's phrase in it.

    Args:
        pieces: the text before the first code, between the first and the second, ..., after the last.

    Returns:
        The text without codes, and for each code the (start, end) of its phrase in that text, or `None`.
    """
    marked = CODE.join(piece.replace(CODE, "\ufffd") for piece in pieces)
    kept = _kept_characters(marked)
    text = "".join(marked[i] for i in kept).replace(CODE, " ")
    # Characters are only ever taken out, so a place in the clean text is the number of characters kept before it.
    return text, [span and (bisect_left(kept, span[0]), bisect_left(kept, span[1])) for span in find_phrases(marked)]


def find_phrases(marked: str) -> list[tuple[int, int] | None]:
    """(start, end) in `marked` of the phrase that each code (`CODE`) stands for, or `None`."""
    spans: list[tuple[int, int] | None] = []
    ends = [*(match.start() for match in _SENTENCE_END.finditer(marked)), len(marked)]
    for start, end in zip([0, *ends], ends, strict=False):
        free = start  # where the text begins that no earlier code has claimed
        for run in _RUN.finditer(marked, start, end):
            span = _phrase_before(marked, free, run.start())
            free = run.end()
            if span is None:
                following = marked.find(CODE, run.end(), end)
                span = _phrase_after(marked, run.end(), end if following < 0 else following)
                free = span[1] if span else free
            spans += [span] * run[0].count(CODE)
    return spans


def _phrase_before(marked: str, start: int, end: int) -> tuple[int, int] | None:
    """The noun phrase at the end of marked[start:end], past closing marks and announcing words."""
    start = max(start, end - _REACH)
    segment, length = marked[start:end], -1
    while length != len(segment):
        length = len(segment)
        segment = _TAIL.sub("", _CLOSING.sub("", segment))
    words = list(re.finditer(_WORD, segment))
    first = len(words)
    for i in range(len(words) - 1, -1, -1):
        gap = segment[words[i].end() : words[i + 1].start() if i + 1 < len(words) else len(segment)]
        # The article of "lobe of the liver" holds a phrase together (its "of" is no stop word).
        joins = words[i][0].lower() in _ARTICLES and first == i + 1 and i > 0 and words[i - 1][0].lower() in _INNER
        if gap.strip(" ") or (words[i][0].lower() in _STOP_WORDS and not joins):
            break
        first = i
    return _trimmed(words[first:], start)


def _phrase_after(marked: str, start: int, end: int) -> tuple[int, int] | None:
    """The noun phrase that begins marked[start:end], past a colon or a dash."""
    offset = end - len(marked[start:end].lstrip(" \t:=*–—-"))
    words: list[re.Match[str]] = []
    for word in re.finditer(_WORD, marked[offset:end]):
        gap = marked[offset + (words[-1].end() if words else 0) : offset + word.start()]
        if gap.strip(" ") or (word[0].lower() in _STOP_WORDS and (words or word[0].lower() not in _ARTICLES)):
            break
        words.append(word)
    return _trimmed(words, offset)


def _trimmed(words: list[re.Match[str]], offset: int) -> tuple[int, int] | None:
    """The span of `words` without articles, numerals, prepositions at its ends; `None` if none or too many stay."""
    words = list(words)
    text = [word[0].lower() for word in words]
    edge = _STOP_WORDS | _INNER
    # What follows "segmentation of" is what a code shows.
    while text and (text[0] in edge or text[0].isdigit() or (text[0] in _GENERIC and text[1:2] == ["of"] != text[1:])):
        del words[0], text[0]
    while text and text[-1] in edge:
        del words[-1], text[-1]
    if len(words) > _LONGEST_PHRASE or _GENERIC.issuperset(text):
        return None
    return offset + words[0].start(), offset + words[-1].end()


_STOP = r"(?=[.!?,;)\]]|\s{0,3}$|\n|\s{1,3}(?:and|or|but|while|whereas|is|are)\b)"
# Applied in this order; each takes out what it matches.
_TIDY = tuple(
    re.compile(pattern, flags=re.IGNORECASE)
    for pattern in (
        rf"(?<={CODE}){_GAP}{CODE}",  # all codes of a run but the first, and what separates them
        # "segmented as [C]."
        rf"(?:(?<=[(\[])|\s{{1,3}})\b(?:as|at|by|in|on|with|via|see)\s{{0,3}}:?(?=\s{{0,3}}{CODE}{_STOP})",
        rf"\s{{0,3}}[(\[{{]\s{{0,3}}{CODE}\s{{0,3}}[)\]}}]",  # "([C])"
        rf"\s{{0,3}}[,;:–—-](?=\s{{0,3}}{CODE}\s{{0,3}}(?:[.!?,;]|\n|$))",  # "here: [C]."
        rf"(?<=[.!?])\s{{0,3}}{CODE}\s{{0,3}}[.!?]",  # a sentence of codes alone
        rf"(?:^|(?<=\n))[ \t]{{0,3}}{CODE}[ \t]{{0,3}}[,;:.–—-]{{0,3}}[ \t]{{0,3}}",  # a code that begins a line
        # A code right between two words is left, to become a space.
        rf"(?!(?<=\w){CODE}\w)[ \t]{{0,3}}{CODE}(?:[ \t]{{1,3}}(?=[.,;:!?)\]]|\n|$))?",
    )
)


def _kept_characters(marked: str) -> list[int]:
    """The places in `marked` of the characters that stay in the clean text."""
    kept = list(range(len(marked)))
    for pattern in _TIDY:
        current = "".join(marked[i] for i in kept)
        for match in reversed(list(pattern.finditer(current))):
            del kept[match.start() : match.end()]
    current = "".join(marked[i] for i in kept)
    return kept[len(current) - len(current.lstrip()) : len(current.rstrip())]
