"""Whether a generated text ends with the gold answer.

Words are compared without case and without the punctuation around them; what stands inside a word
belongs to it, so that 2.5, 10/5 and C++ are words of their own. Numbers are compared by value.
"""

import re
import unicodedata
from decimal import Decimal

# Marks that end a sentence or set a word apart, and that no word needs at its edges. Signs that
# change what a word means (+ - # % / and the currencies' places) stay.
QUOTING = frozenset("*_`\"'~")
MEANING = frozenset("#%&@/\\†‡§¶‰")
GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
# An equals sign and an arrow separate; a comma, colon or semicolon does where it joins no digits.
SEPARATORS = re.compile(r"[=→⇒≈]|(?<!\d)[,:;]|[,:;](?!\d)")
# Minus sign, figure dash, en dash and em dash.
MINUS = dict.fromkeys((0x2212, 0x2012, 0x2013, 0x2014), "-")


def answer_matches(generated: str, answer: str) -> bool:
    """Whether the generation is the gold answer or ends with it."""
    words, gold = _words(generated), _words(answer)
    return bool(gold) and words[-len(gold) :] == gold


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKC", text).casefold().translate(MINUS)
    stripped = (_stripped(word) for word in SEPARATORS.sub(" ", plain).split())
    return [_by_value(word) for word in stripped if word]


def _stripped(word: str) -> str:
    begin, end = 0, len(word)
    while begin < end and _is_edge(word[begin], word[begin + 1 : end]):
        begin += 1
    while end > begin and _is_edge(word[end - 1], ""):
        end -= 1
    return word[begin:end]


def _is_edge(sign: str, behind: str) -> bool:
    """Whether a sign at the edge of a word is no part of it; `behind` is what follows a sign at the
    front.
    """
    if sign in QUOTING or unicodedata.category(sign) == "Sc":
        return True
    if sign == "." and behind[:1].isdigit():
        return False  # .5
    return unicodedata.category(sign) in {"Po", "Ps", "Pe", "Pi", "Pf"} and sign not in MEANING


def _by_value(word: str) -> str:
    """A number in one spelling: 1,000 and 1000.0 as 1000."""
    if GROUPED.fullmatch(word):
        word = word.replace(",", "")
    if not NUMBER.fullmatch(word):
        return word
    value = Decimal(word)
    return "0" if not value else format(value.normalize(), "f")
