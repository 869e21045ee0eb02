"""Text from models and data for terminals and Markdown."""

import re

# C0 and C1 controls but for tab and line feed, and marks that turn the direction of what follows.
_CONTROL = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]"
)


def printable(text: str) -> str:
    """The text with control characters escaped: it cannot drive a terminal."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def fenced(text: str) -> str:
    """The text as a block of Markdown that nothing in it can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{printable(text)}\n{fence}"
