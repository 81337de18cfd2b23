"""Answers as words: the normalisation that this field's published numbers rest on, and one without its surprises."""

import re


MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {"none": "0"} | {
    word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
ARTICLES = frozenset(("a", "an", "the"))
# VQAv2's list: a word that lacks exactly one of these apostrophes gets it back.
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in CONTRACTED for i, mark in enumerate(word) if mark == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # as published, the wrong way round
FULL_STOP = re.compile(r"(?<!\d)\.|\.(?!\d)")
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
STRICT_WORD = re.compile(r"\d+\.\d+|[^\W_]+(?:'[^\W_]+)*")


def normalize(text: str) -> str:
    """VQAv2-style normalisation, which this field's published numbers rest on; the card lists its steps.

    All occurrences of a mark are deleted if one of them touches a space *or* the text holds digit, comma, digit
    anywhere; else all become a space, as in VQAv2's public evaluation: "left,right" is two words, "left,right, both"
    "leftright both".
    """
    text = text.lower()
    counts_in_thousands = DIGIT_COMMA_DIGIT.search(text) is not None
    plain = text
    for mark in MARKS:
        deleted = counts_in_thousands or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if deleted else " ")
    plain = FULL_STOP.sub("", plain)
    words = [NUMBERS.get(word, word) for word in plain.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def strict_words(text: str) -> list[str]:
    """Whole words in lower case: letters and digits, decimals kept, every other mark a boundary.

    "1,200" is one number; number words, articles and contractions are treated as in `normalize`.
    """
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.lower().replace("\u2019", "'"))
    words = [NUMBERS.get(word, word) for word in STRICT_WORD.findall(text)]
    return [CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES]
