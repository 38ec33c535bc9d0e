"""Soft accuracy among people's answers, and the cleaning of answers before they are compared: VQA's rules.

Source: the VQA evaluation, arXiv:1505.00468, and its reuse in M4C, arXiv:1911.06258.
"""

import re
from collections.abc import Sequence

NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've"
    " he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't"
    " not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll"
    " somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd"
    " there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll"
    " what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's"
    " won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
).split()
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in CONTRACTED for at, letter in enumerate(word) if letter == "'"
}
"""Any one apostrophe forgotten is put back; the evaluators' lists also spell one word the other way round."""
CONTRACTIONS["somebody'd"] = "somebodyd"

_THOUSANDS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32
"""So many periods go at most: the evaluators pass a regular expression's flag where its count is meant."""


def agreement(answer: str, people: Sequence[str]) -> float:
    """Returns the mean over all leave-one-out sets of people of min(1, those who said it / 3)."""
    said = people.count(answer)
    return sum(min(1, (said - (one == answer)) / 3) for one in people) / len(people)


def without_punctuation(text: str) -> str:
    """Returns the text without punctuation: a mark beside a space vanishes, one inside a word becomes a space.

    Where the text has a number with a comma, every mark vanishes. A period stays before a digit only.
    """
    together = _THOUSANDS.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or together else " ")
    return _PERIOD.sub("", cleaned, count=_PERIODS)


def plain_words(text: str) -> str:
    """Returns the text in lower case, number words as digits, without articles, its apostrophes put back."""
    numbered = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in ARTICLES)


def one_line(text: str) -> str:
    """Returns the text with spaces for line breaks and tabs, stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def m4c(text: str) -> str:
    """Returns an answer as M4C and LLaVA clean it: commas and question marks go first, 's becomes a word."""
    split = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(without_punctuation(one_line(split)))
