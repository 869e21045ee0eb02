"""Two vocabularies folded onto the tokens that they share.

A class is the event that the text goes on with a certain shared token: every other token of either
side is in the class of the shared token that its text begins with, as the other tokenizer cuts it.
Ends of a turn are one class, and so is what stands for no text at all. So both sides' probabilities
of classes add up to 1, and mean the same.

Dimensions: V ids of the student, W ids of the teacher.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from kdflow_core.alignment.token_bytes import TokenBytes

HOPS = 64  # from one vocabulary to the other and back, always to a shorter token


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The class of every id on both sides, int64, from `count` classes; `shared` are the tokens
    that both have.
    """

    student_V: np.ndarray
    teacher_W: np.ndarray
    count: int
    shared: int


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer by its bytes, its ends of a turn, and the rows of its model's head."""

    tokenizer: PreTrainedTokenizerBase
    tokens: TokenBytes
    end_ids: Sequence[int]
    size: int


def fold(student: Vocabulary, teacher: Vocabulary) -> Classes:
    """The classes of two vocabularies."""
    roots = _Roots(student, teacher)
    names: dict[bytes, bytes] = {}
    for number, side in enumerate((student, teacher)):
        for token in side.tokens.id_of:
            root = roots.of(token, number)
            if root is not None:
                # How many spaces a token has is where tokenizers differ most, and says least.
                names[token] = root if root.strip(b" ") or not roots.one_space else b" "
    return named_classes(student, teacher, names)


def named_classes(
    student: Vocabulary, teacher: Vocabulary, name_of: Mapping[bytes, bytes]
) -> Classes:
    """Classes by a name for each token. The ends of a turn are one class, and so are the tokens
    without a name.
    """
    numbers = {name: k for k, name in enumerate(sorted(set(name_of.values())))}
    end, none = len(numbers), len(numbers) + 1
    sides = []
    for side in (student, teacher):
        spelled = side.tokens.spelled[: side.size]
        classes = np.full(side.size, none)
        classes[: len(spelled)] = [
            numbers[name_of[token]] if token in name_of else none for token in spelled
        ]
        classes[list(side.end_ids)] = end
        sides.append(classes)
    # Numbered without gaps.
    used, numbers_of = np.unique(np.concatenate(sides), return_inverse=True)
    student_V, teacher_W = np.split(numbers_of, [student.size])
    shared = len(student.tokens.id_of.keys() & teacher.tokens.id_of.keys())
    return Classes(student_V=student_V, teacher_W=teacher_W, count=len(used), shared=shared)


class _Roots:
    """The shared token that a token's text begins with."""

    def __init__(self, student: Vocabulary, teacher: Vocabulary) -> None:
        self._tokens = (student.tokens, teacher.tokens)
        cutters = [cutter_of(side.tokenizer) for side in (student, teacher)]
        # The first token of each side's own tokens, as the other side cuts them.
        self._first = [
            first_pieces(self._tokens[side], cutters[1 - side], self._tokens[1 - side])
            for side in (0, 1)
        ]
        self.one_space = all(b" " in tokens.id_of for tokens in self._tokens)

    def of(self, token: bytes, side: int) -> bytes | None:
        """The root of a token of a side; None where there is none."""
        for _ in range(HOPS):
            if token in self._tokens[1 - side].id_of:
                return token
            piece = self._first[side].get(token)
            if piece is None:
                return None
            token, side = piece, 1 - side
        return None


def first_pieces(
    tokens: TokenBytes, cutter: Tokenizer, other: TokenBytes
) -> dict[bytes, bytes | None]:
    """For every token that the other side does not have, the first of the pieces that the other
    side cuts it into; None where it has none.
    """
    missing = [token for token in tokens.id_of if token not in other.id_of]
    texts, whole = [], []
    first: dict[bytes, bytes | None] = {}
    for token in missing:
        try:
            texts.append(token.decode())
            whole.append(token)
        except UnicodeDecodeError:
            first[token] = longest_prefix(token, other)
    for token, cut in zip(
        whole, cutter.encode_batch_fast(texts, add_special_tokens=False), strict=True
    ):
        piece = next((other.spelled[i] for i in cut.ids if other.spelled[i]), b"")
        # Text that is rewritten, or a mark in front of it: by what both spell, then.
        cuts = 0 < len(piece) < len(token) and token.startswith(piece)
        first[token] = piece if cuts else longest_prefix(token, other)
    return first


def longest_prefix(token: bytes, other: TokenBytes) -> bytes | None:
    """The longest of a token's proper beginnings that is a token of the other side."""
    ends = range(len(token) - 1, 0, -1)
    return next((token[:end] for end in ends if token[:end] in other.id_of), None)


def cutter_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A tokenizer that cuts text as it stands in the middle of other text: nothing is put in front
    of it, and nothing is rewritten but spaces.
    """
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    form["normalizer"] = _kept(form.get("normalizer"), "normalizers")
    form["post_processor"] = None
    made = Tokenizer.from_str(json.dumps(_unprefixed(form)))
    made.encode_special_tokens = True
    return made


def _kept(normalizer: dict[str, Any] | None, key: str) -> dict[str, Any] | None:
    """A normalizer without what changes more than spaces."""
    if normalizer is None:
        return None
    if key in normalizer:
        parts = [part for part in (_kept(p, key) for p in normalizer[key]) if part is not None]
        return {**normalizer, key: parts}
    return normalizer if normalizer["type"] == "Replace" else None


def _unprefixed(form: dict[str, Any]) -> dict[str, Any]:
    """The same with a pre-tokenizer that puts no space in front."""
    pre = form.get("pre_tokenizer")
    for part in (pre or {}).get("pretokenizers", [pre] if pre else []):
        if "add_prefix_space" in part:
            part["add_prefix_space"] = False
        if "prepend_scheme" in part:
            part["prepend_scheme"] = "never"
    return form
