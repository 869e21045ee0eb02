"""What a run with two tokenizers can do, and what it is refused."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from configs.schema.run import RunConfig

AlignmentMode = Literal["auto", "exact", "bytes"]


def check_aligned(run: "RunConfig") -> None:
    """Refuse what does not go with student and teacher aligned by bytes. Raises ValueError."""
    refused = {
        "student.vocabulary_parallel: classes need whole output heads": (
            run.student.vocabulary_parallel
        ),
        f"loss.divergence={run.loss.divergence.type}: it is of single tokens, not of classes of "
        "them; forward_kl is of both": (
            run.algorithm.reads_signals
            and run.algorithm.COMPARES_CLASSES
            and not run.loss.is_of_classes
        ),
    }
    reason = next((text for text, holds in refused.items() if holds), None)
    if reason is not None:
        raise ValueError(
            f"not between two tokenizers, which `alignment: bytes` aligns: {reason}. Change that, "
            "or choose a student with the teacher's tokenizer"
        )
