"""Student and teacher of a stage, aligned by bytes where they have two tokenizers. Loads no model
code.
"""

from kdflow_core.alignment.tokenizer_pair import TokenizerPair, vocabulary
from kdflow_core.alignment.translation import Translator
from kdflow_core.models.tokenizers import true_vocabulary_size
from tasks.checks.chat_check import aligns_by_bytes
from tasks.jobs.chats import chat
from tasks.jobs.stage_run import SIDES, StageRun


def pair(stage: StageRun) -> TokenizerPair | None:
    """Both sides; None where they are compared token by token."""
    tokens = stage.spec.inputs.get("tokens")
    # Tokens that were made without an alignment say so, sooner than two tokenizers do.
    if (
        tokens is not None
        and not stage.store.manifest(tokens.kind, tokens.digest).info["alignment"]
    ):
        return None
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


def translator(stage: StageRun) -> Translator | None:
    """What brings one side's answers into the other's tokens; None where both have the same."""
    made = pair(stage)
    if made is None:
        return None
    chats = {side: chat(stage, side) for side in SIDES}
    return Translator(pair=made, chats=chats, limit=stage.length_limit)
