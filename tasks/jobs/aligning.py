"""Student and teacher of a stage, aligned by bytes where they have two tokenizers. Loads no model
code.
"""

from collections.abc import Mapping

from kdflow_core.alignment.tokenizer_pair import TokenizerPair, vocabulary
from kdflow_core.alignment.translation import Translated, Translator
from kdflow_core.data.chat import ChatFormat
from kdflow_core.models.tokenizers import true_vocabulary_size
from tasks.checks.chat_check import aligns_by_bytes
from tasks.jobs.chats import chat
from tasks.jobs.stage_run import SIDES, StageRun
from tasks.stages.slices import Side

# The share of answers that may be read in part before it is told: a few percent are usual.
MOST_SHORTENED = 0.05


def pair(stage: StageRun, view: str = "teacher") -> TokenizerPair | None:
    """Both sides, the teacher as it reads the view; None where they are compared token by token."""
    return pair_of(stage, _chats(stage)) if _may_align(stage, view) else None


def pair_of(stage: StageRun, chats: Mapping[Side, ChatFormat]) -> TokenizerPair | None:
    """The same, where the chat formats are at hand."""
    if not aligns_by_bytes(stage.run, chats["student"], chats["teacher"]):
        return None
    student, teacher = (
        vocabulary(
            chats[side].tokenizer,
            chats[side].end_ids,
            true_vocabulary_size(chats[side].tokenizer),
            side,
        )
        for side in SIDES
    )
    return TokenizerPair(vocabularies=(student, teacher))


def translator(stage: StageRun) -> Translator | None:
    """What brings one side's answers into the other's tokens; None where both have the same."""
    if not _may_align(stage, "teacher"):
        return None
    chats = _chats(stage)
    made = pair_of(stage, chats)
    return None if made is None else Translator(pair=made, chats=chats, limit=stage.length_limit)


def tell_shortened(stage: StageRun, translated: Translated) -> None:
    """Say where one side reads less of the other's answers than it should."""
    if translated.shortened > MOST_SHORTENED:
        stage.reporter.message(
            f"of {translated.answers} answers, {translated.rewritten} are read otherwise by the "
            f"other side's tokenizer, and {translated.invalid_utf8} are no UTF-8: what follows in "
            "them is not distilled. Look at some by `kdflow show`; a tokenizer that rewrites text "
            "is the usual cause"
        )


def _chats(stage: StageRun) -> dict[Side, ChatFormat]:
    return {side: chat(stage, side) for side in SIDES}


def _may_align(stage: StageRun, view: str) -> bool:
    """Tokens that were made without an alignment say so, sooner than two tokenizers do."""
    tokens = stage.spec.inputs.get("tokens")
    if tokens is None:
        return True
    return view in stage.store.manifest(tokens.kind, tokens.digest).info["aligned"]
