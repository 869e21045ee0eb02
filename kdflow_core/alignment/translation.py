"""What one model has written, as the other one reads it.

The writer's view has the very ids that it sampled. The other view has the same text in its own
tokens, and its own end of turn where the writer has ended the turn. Text that is no UTF-8 (an
answer that was cut inside a character, or broken bytes that were sampled) goes up to the first such
byte.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from kdflow_core.alignment.tokenizer_pair import TokenizerPair
from kdflow_core.alignment.turns import align_answer
from kdflow_core.contracts import Example, TokenSequence
from kdflow_core.data.chat import ChatFormat

Side = Literal["student", "teacher"]
SIDES: tuple[Side, Side] = ("student", "teacher")


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

    def _reads(self, example: Example, ids_N: np.ndarray, by: Side, other: Side) -> np.ndarray:
        """The answer in the tokens of the other side."""
        writer = self.pair.vocabularies[SIDES.index(by)]
        closed = len(ids_N) > 0 and int(ids_N[-1]) in writer.end_ids
        spelled = writer.tokens.spell(ids_N[:-1] if closed else ids_N)
        if writer.tokens.prefixes:
            spelled = spelled.removeprefix(b" ")
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
