"""Maps of two vocabularies onto classes: folding both (see `classes`), and others.

The others are published, and what the folded classes are judged against. Each loses something: a
token without a partner meets a class that says too little of it (`shared_tail`), or one that the
text contradicts, where the teacher's token is the shorter one (`byte_prefix`, `first_piece`).
"""

from collections.abc import Callable, Mapping

from configs.schema.loss import ClassMap
from kdflow_core.alignment.classes import (
    Classes,
    Vocabulary,
    cutter_of,
    first_pieces,
    fold,
    longest_prefix,
    named_classes,
)


def shared_tail(student: Vocabulary, teacher: Vocabulary) -> Classes:
    """A class for each shared token, one for the ends of a turn, and one for all other tokens."""
    shared = student.tokens.id_of.keys() & teacher.tokens.id_of.keys()
    return named_classes(student, teacher, {token: token for token in shared})


def byte_prefix(student: Vocabulary, teacher: Vocabulary) -> Classes:
    """A class for each of the student's tokens: a teacher's token is in that of the longest one
    that it begins with (byte-prefix marginalization, arXiv 2607.22334).
    """
    own = student.tokens
    begins = {token: longest_prefix(token, own) for token in teacher.tokens.id_of}
    return named_classes(student, teacher, _of_student(student, begins))


def first_piece(student: Vocabulary, teacher: Vocabulary) -> Classes:
    """A class for each of the student's tokens: a teacher's token is in that of the first one that
    the student's tokenizer cuts it into.
    """
    own, other = student.tokens, teacher.tokens
    return named_classes(
        student,
        teacher,
        _of_student(student, first_pieces(other, cutter_of(student.tokenizer), own)),
    )


MAPS: Mapping[ClassMap, Callable[[Vocabulary, Vocabulary], Classes]] = {
    "folded": fold,
    "shared_tail": shared_tail,
    "byte_prefix": byte_prefix,
    "first_piece": first_piece,
}


def _of_student(student: Vocabulary, begins: dict[bytes, bytes | None]) -> dict[bytes, bytes]:
    """The class of every token, by its name: the student's own are each in their own."""
    known = {token: piece for token, piece in begins.items() if piece is not None}
    return known | {token: token for token in student.tokens.id_of}
