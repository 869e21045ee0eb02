"""How two tokenizers stand to each other, in one word and a sentence."""

from typing import Literal

from transformers import PreTrainedTokenizerBase

from kdflow_core.models.tokenizers import same_vocabulary

Relation = Literal["exact", "padded", "extended", "bytes"]


def relation(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    head_rows: tuple[int, int],
) -> tuple[Relation, str]:
    """The relation, and what it says of the two: `exact` (one vocabulary), `padded` (the same, in
    output heads of other sizes, of which only the tokens' rows count), `extended` (one vocabulary
    but for added tokens, which are folded) or `bytes` (any others). `head_rows` are those of the
    output heads of student and teacher.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if same_vocabulary(student, teacher):
        both = f"student and teacher have one vocabulary of {len(ours):,} tokens"
        if head_rows[0] == head_rows[1]:
            return "exact", both
        return "padded", (
            f"{both}, in output heads of {head_rows[0]:,} and {head_rows[1]:,} rows; rows without "
            "a token get no probability"
        )
    shared = ours.keys() & theirs.keys()
    added = (ours.keys() - shared <= student.get_added_vocab().keys()) and (
        theirs.keys() - shared <= teacher.get_added_vocab().keys()
    )
    if added and all(ours[token] == theirs[token] for token in shared):
        return "extended", (
            f"{len(shared):,} tokens have one id on both sides; {len(ours) - len(shared):,} added "
            f"ones are the student's alone and {len(theirs) - len(shared):,} the teacher's, and "
            "are folded onto what their text begins with"
        )
    return "bytes", "student and teacher have different vocabularies"
