"""Which rows of student and teacher say something about the same text: one sample at a time.

Answers pair by turn. Of a turn, what both sides spell alike is aligned: the answer itself, without
the marks and the white space that one template puts around it and the other does not. The ends of
turns pair by their role. Rows are numbered as the supervised tokens of a sequence are.

Dimensions: T tokens, R tokens of a turn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kdflow_core.alignment.boundaries import common_boundaries
from kdflow_core.alignment.token_bytes import TokenBytes
from kdflow_core.contracts import Alignment, TokenSequence
from kdflow_core.data.messages import SampleError


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How a model reads: the bytes of its ids, and those that end a turn."""

    tokens: TokenBytes
    end_ids: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """A run of supervised tokens: their ids, the row of the first, and whether an end is behind
    them. The first row is -1 where the sequence begins with the answer, which nothing predicts.
    """

    ids_R: np.ndarray
    first_row: int
    closed: bool


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """A turn's tokens from number `first` on, with the bytes of each that are the answer's."""

    first: int
    length_R: np.ndarray


def align(
    student: TokenSequence,
    teacher: TokenSequence,
    readers: tuple[Reader, Reader],
    contents: Sequence[str],
) -> Alignment:
    """The alignment of one sample, whose learned answers are `contents`.

    Raises SampleError `runs_disagree` where the two sides supervise different numbers of turns, and
    `bytes_disagree` where they do not spell the same answer.
    """
    sides = [_turns(s, reader) for s, reader in zip((student, teacher), readers, strict=True)]
    if not len(sides[0]) == len(sides[1]) == len(contents):
        raise SampleError(
            "runs_disagree",
            f"a sample has {len(contents)} answers, of which the student's tokens have "
            f"{len(sides[0])} and the teacher's {len(sides[1])}",
        )
    pairs, spans = [np.zeros((0, 2), np.int32)], [np.zeros((0, 4), np.int32)]
    for own, other, content in zip(*sides, contents, strict=True):
        turn_pairs, turn_spans = _align_turn(own, other, readers, content)
        pairs.append(turn_pairs)
        spans.append(turn_spans)
    return Alignment(pairs_P2=np.concatenate(pairs), spans_S4=np.concatenate(spans))


def align_answer(
    student: TokenSequence, teacher: TokenSequence, readers: tuple[Reader, Reader]
) -> Alignment:
    """The alignment of an answer that one side has written and the other reads as text: up to the
    first byte in which the two differ, since what reads may also rewrite.
    """
    sides = [_turns(s, reader) for s, reader in zip((student, teacher), readers, strict=True)]
    if not all(sides):
        return Alignment(pairs_P2=np.zeros((0, 2), np.int32), spans_S4=np.zeros((0, 4), np.int32))
    own, other = sides[0][-1], sides[1][-1]
    texts = [r.tokens.spell(turn.ids_R) for turn, r in zip((own, other), readers, strict=True)]
    begins, size = common_beginning(texts, readers)
    whole = all(begin + size == len(text) for begin, text in zip(begins, texts, strict=True))
    closed = own.closed and other.closed and whole
    pairs_P2, spans_S4 = _align_part(own, other, readers, begins, size, closed=closed)
    return Alignment(pairs_P2=pairs_P2, spans_S4=spans_S4)


def common_beginning(
    texts: Sequence[bytes], readers: tuple[Reader, Reader]
) -> tuple[tuple[int, int], int]:
    """Where the text begins on both sides, and how many bytes of it are the same: behind the space
    that one tokenizer puts in front of its text, where it is that.
    """
    starts = [
        (0, 1) if reader.tokens.prefixes and text.startswith(b" ") else (0,)
        for text, reader in zip(texts, readers, strict=True)
    ]
    found = [
        ((i, j), _equal_bytes(texts[0][i:], texts[1][j:])) for i in starts[0] for j in starts[1]
    ]
    return max(found, key=lambda pair: pair[1])


def _equal_bytes(own: bytes, other: bytes) -> int:
    """How many bytes two texts begin with in common."""
    size = min(len(own), len(other))
    same = np.frombuffer(own[:size], np.uint8) == np.frombuffer(other[:size], np.uint8)
    return size if same.all() else int(same.argmin())


def _turns(sequence: TokenSequence, reader: Reader) -> list[_Turn]:
    return list(_iterate_turns(sequence, reader))


def _iterate_turns(sequence: TokenSequence, reader: Reader) -> Iterator[_Turn]:
    padded = np.concatenate([[False], sequence.supervised_T, [False]]).astype(np.int8)
    edges = np.diff(padded)
    row = 0
    for begin, end in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True):
        closed = int(sequence.ids_T[end - 1]) in reader.end_ids
        # Whether the sequence begins with this answer, whose first token nothing predicts.
        whole = int(begin == 1 and reader.tokens.length_V[sequence.ids_T[0]] > 0)
        ids_R = sequence.ids_T[begin - whole : end - closed]
        yield _Turn(ids_R=ids_R, first_row=row - whole, closed=closed)
        row += int(end - begin)


def _align_turn(
    own: _Turn, other: _Turn, readers: tuple[Reader, Reader], content: str
) -> tuple[np.ndarray, np.ndarray]:
    texts = [r.tokens.spell(turn.ids_R) for turn, r in zip((own, other), readers, strict=True)]
    part = _shared_text(texts[0], texts[1], content)
    begins = (texts[0].rfind(part), texts[1].rfind(part))
    closed = own.closed and other.closed
    return _align_part(own, other, readers, begins, len(part), closed=closed)


def _align_part(
    own: _Turn,
    other: _Turn,
    readers: tuple[Reader, Reader],
    begins: tuple[int, int],
    size: int,
    *,
    closed: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs and spans of `size` bytes of a turn, which begin at `begins`; and with `closed` those
    of its end.
    """
    answers = [
        _answer(turn, reader.tokens, begin, size)
        for turn, reader, begin in zip((own, other), readers, begins, strict=True)
    ]
    common = common_boundaries(answers[0].length_R, answers[1].length_R)
    rows = [turn.first_row + a.first for turn, a in zip((own, other), answers, strict=True)]
    pairs_P2 = common.pairs_P2 + np.array(rows, np.int32)
    spans_S4 = common.groups_S4 + np.repeat(np.array(rows, np.int32), 2)
    if not closed:
        # More text could have changed where the last tokens are cut.
        spans_S4 = spans_S4[:-1]
    pairs_P2 = pairs_P2[(pairs_P2 >= 0).all(1)]
    spans_S4 = spans_S4[(spans_S4 >= 0).all(1)]
    if closed:
        ends = [turn.first_row + len(turn.ids_R) for turn in (own, other)]
        pairs_P2 = np.append(pairs_P2, np.array([ends], np.int32), axis=0)
        last = [ends[0], ends[0] + 1, ends[1], ends[1] + 1]
        spans_S4 = np.append(spans_S4, np.array([last], np.int32), axis=0)
    return pairs_P2, spans_S4


def _shared_text(own: bytes, other: bytes, content: str) -> bytes:
    """What both sides spell of an answer: all of it, or the message's own text in it."""
    if own == other:
        return own
    # Templates may trim a message; what is left stands in both as it is.
    for text in (content, content.strip()):
        part = text.encode()
        if part in own and part in other:
            return part
    raise SampleError(
        "bytes_disagree",
        f"the student's tokens spell {_shown(own)} and the teacher's {_shown(other)}, and the "
        f"answer {_shown(content.encode())} does not stand in both as it is",
    )


def _answer(turn: _Turn, tokens: TokenBytes, begin: int, size: int) -> _Answer:
    """The tokens that spell `size` bytes of a turn from byte `begin` on."""
    length_R = tokens.length_V[turn.ids_R].astype(np.int64)
    ends_R = np.cumsum(length_R)
    inside_R = np.minimum(ends_R, begin + size) - np.maximum(ends_R - length_R, begin)
    inside_R = np.maximum(inside_R, 0)
    filled = np.flatnonzero(inside_R)
    if not len(filled):
        return _Answer(first=len(turn.ids_R), length_R=inside_R[:0])
    first, last = int(filled[0]), int(filled[-1])
    # The space that a tokenizer puts in front of a word may be a token of its own.
    if first and tokens.spelled[int(turn.ids_R[first - 1])] == b" ":
        first -= 1
    return _Answer(first=first, length_R=inside_R[first : last + 1])


def _shown(text: bytes) -> str:
    return repr(text[:60].decode(errors="replace")) + ("..." if len(text) > 60 else "")
