"""Student and teacher of a stage, aligned by bytes where they have two tokenizers. Loads no model
code.
"""

from kdflow_core.alignment.tokenizer_pair import TokenizerPair, vocabulary
from kdflow_core.models.tokenizers import true_vocabulary_size
from tasks.checks.chat_check import aligns_by_bytes
from tasks.jobs.chats import chat
from tasks.jobs.stage_run import SIDES, StageRun


def pair(stage: StageRun) -> TokenizerPair | None:
    """Both sides; None where they are compared token by token."""
    chats = {side: chat(stage, side) for side in SIDES}
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
