"""What one model has written, as the other one reads it.

The writer's view has the very ids that it sampled. The other view has the same text in its own
tokens, and its own end of turn where the writer has ended the turn. Text that is no UTF-8 (an
answer that was cut inside a character, or broken bytes that were sampled) goes up to the first such
byte.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from kdflow_core.alignment.tokenizer_pair import TokenizerPair
from kdflow_core.alignment.turns import align_answer, common_beginning
from kdflow_core.contracts import Example, TokenSequence
from kdflow_core.data.chat import ChatFormat

Side = Literal["student", "teacher"]
SIDES: tuple[Side, Side] = ("student", "teacher")


@dataclass(frozen=True, kw_only=True)
class Translated:
    """What became of answers on their way to the other side: how many there are; those that the
    writer's own tokenizer would cut otherwise; those that are no UTF-8 somewhere; and others that
    the other side reads otherwise (normalized, say, or cut to its limit). Of their tokens, as many
    are paired with one of the other side's.
    """

    answers: int = 0
    not_canonical: int = 0
    invalid_utf8: int = 0
    rewritten: int = 0
    tokens: int = 0
    paired: int = 0

    @property
    def shortened(self) -> float:
        """The share of the answers of which the other side reads only a beginning."""
        return (self.invalid_utf8 + self.rewritten) / max(1, self.answers)


@dataclass(frozen=True, kw_only=True)
class Translator:
    """Both sides with their chat formats; no view gets longer than `limit` tokens."""

    pair: TokenizerPair
    chats: Mapping[Side, ChatFormat]
    limit: int

    def answered(self, example: Example, ids_N: np.ndarray, by: Side) -> Example:
        """An example with what the model of the side `by` has written behind its context."""
        (other,) = (side for side in SIDES if side != by)
        views: dict[str, TokenSequence] = {
            by: with_answer(example.views[by], ids_N),
            other: with_answer(example.views[other], self._reads(example, ids_N, by, other)),
        }
        alignment = align_answer(views["student"], views["teacher"], self.pair.readers)
        return replace(example, views=views, alignments={"teacher": alignment})

    def count(self, examples: Iterable[Example], by: Side) -> Translated:
        """What became of the answers that the model of the side `by` has written."""
        counts = Counter[str]()
        for example in examples:
            ids_N = example.views[by].target_ids_N
            spelled, closed = self._spelled(ids_N, by)
            text = valid_text(spelled)
            valid = text.encode() == spelled
            counts["answers"] += 1
            counts["invalid_utf8"] += not valid
            if valid:
                own_N = self.chats[by].ids_behind(text) if text else []
                counts["not_canonical"] += own_N != (ids_N[:-1] if closed else ids_N).tolist()
                counts["rewritten"] += not self._is_whole(example)
            counts["tokens"] += len(example.student.target_ids_N)
            counts["paired"] += len(example.alignments["teacher"].pairs_P2)
        return Translated(**counts)

    def _is_whole(self, example: Example) -> bool:
        """Whether both sides spell the same answer."""
        texts = [
            vocabulary.tokens.spell(example.views[side].target_ids_N)
            for side, vocabulary in zip(SIDES, self.pair.vocabularies, strict=True)
        ]
        begins, size = common_beginning(texts, self.pair.readers)
        return all(begin + size == len(text) for begin, text in zip(begins, texts, strict=True))

    def _spelled(self, ids_N: np.ndarray, side: Side) -> tuple[bytes, bool]:
        """The text of an answer, without the space that a tokenizer has put in front; and whether
        it has ended its turn.
        """
        own = self.pair.vocabularies[SIDES.index(side)]
        closed = len(ids_N) > 0 and int(ids_N[-1]) in own.end_ids
        spelled = own.tokens.spell(ids_N[:-1] if closed else ids_N)
        return spelled.removeprefix(b" ") if own.tokens.prefixes else spelled, closed

    def _reads(self, example: Example, ids_N: np.ndarray, by: Side, other: Side) -> np.ndarray:
        """The answer in the tokens of the other side."""
        spelled, closed = self._spelled(ids_N, by)
        text = valid_text(spelled)
        chat = self.chats[other]
        ids = chat.ids_behind(text) if text else []
        end = chat.closing_id({"role": "assistant", "content": text})
        if closed and end is not None and text.encode() == spelled:
            ids = [*ids, end]
        room = self.limit - len(example.views[other].context_ids_T)
        return np.array(ids[: max(0, room)], np.int32)


def valid_text(spelled: bytes) -> str:
    """Bytes as text, up to the first that is no UTF-8."""
    try:
        return spelled.decode()
    except UnicodeDecodeError as error:
        return spelled[: error.start].decode()


def with_answer(sequence: TokenSequence, answer: np.ndarray | Sequence[int]) -> TokenSequence:
    """The sequence's context with another answer behind it, which alone is supervised."""
    context = sequence.context_ids_T
    supervised_T = np.zeros(len(context) + len(answer), bool)
    supervised_T[len(context) :] = True
    ids_T = np.concatenate([context, np.asarray(answer, np.int32)])
    return TokenSequence(ids_T=ids_T, supervised_T=supervised_T, media=sequence.media)
