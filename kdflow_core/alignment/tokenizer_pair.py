"""Student and teacher as readers of one text, by the tokenizers of both."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from configs.schema.loss import ClassMap
from kdflow_core.alignment.class_maps import MAPS
from kdflow_core.alignment.classes import Classes, Vocabulary
from kdflow_core.alignment.token_bytes import token_bytes
from kdflow_core.alignment.turns import Reader, align
from kdflow_core.contracts import Alignment, TokenSequence
from kdflow_core.models.tokenizers import same_vocabulary


@dataclass(frozen=True, kw_only=True)
class TokenizerPair:
    """The student's side first, the teacher's second."""

    vocabularies: tuple[Vocabulary, Vocabulary]

    @cached_property
    def readers(self) -> tuple[Reader, Reader]:
        """Both sides as `align` takes them."""
        student, teacher = (
            Reader(tokens=side.tokens, end_ids=frozenset(side.end_ids))
            for side in self.vocabularies
        )
        return student, teacher

    def as_both_read(self, text: str) -> str:
        """A text in the form that both tokenizers cut: where one composes characters first, both
        are given them composed.
        """
        composes = any(side.tokens.composes for side in self.vocabularies)
        return unicodedata.normalize("NFC", text) if composes else text

    def align(
        self, student: TokenSequence, teacher: TokenSequence, contents: Sequence[str]
    ) -> Alignment:
        """See `turns.align`."""
        return align(student, teacher, self.readers, contents)

    @property
    def has_classes(self) -> bool:
        """Whether the two vocabularies differ, so that only classes of tokens can be compared."""
        student, teacher = (side.tokenizer for side in self.vocabularies)
        return not same_vocabulary(student, teacher)

    @property
    def sizes(self) -> tuple[int, int]:
        """The ids of both."""
        student, teacher = self.vocabularies
        return student.size, teacher.size

    @property
    def is_shared(self) -> tuple[np.ndarray, np.ndarray]:
        """Of every id of both, whether the other side has the token too, or it ends a turn."""
        student, teacher = self.vocabularies
        return _is_shared(student, teacher), _is_shared(teacher, student)

    @property
    def shared_ids(self) -> np.ndarray:
        """The ids [O, 2] of the tokens that both have, in either vocabulary; int64."""
        student, teacher = self.vocabularies
        own, other = student.tokens.id_of, teacher.tokens.id_of
        ids_O2 = np.array(
            [(own[token], other[token]) for token in sorted(own.keys() & other.keys())]
            + [(student.end_ids[0], teacher.end_ids[0])]
        )
        return ids_O2[(ids_O2 < self.sizes).all(1)]

    def classes(self, by: ClassMap) -> Classes:
        """The classes of both vocabularies; takes seconds."""
        return MAPS[by](*self.vocabularies)


def _is_shared(own: Vocabulary, other: Vocabulary) -> np.ndarray:
    found = np.zeros(own.size, bool)
    spelled = own.tokens.spelled[: own.size]
    found[: len(spelled)] = [token in other.tokens.id_of for token in spelled]
    found[list(own.end_ids)] = True
    return found


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], size: int, title: str
) -> Vocabulary:
    """A side of a pair. Raises ModelError, which names it by its `title`."""
    tokens = token_bytes(tokenizer, title)
    return Vocabulary(tokenizer=tokenizer, tokens=tokens, end_ids=tuple(end_ids), size=size)
