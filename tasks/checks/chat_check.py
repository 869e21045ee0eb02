"""How a run's models are spoken to, and whether both read the same. Loads no model code."""

from collections.abc import Sequence
from pathlib import Path

from configs.schema.alignment import check_aligned
from configs.schema.models import ChatTemplate
from configs.schema.run import RunConfig
from kdflow_core.alignment.token_bytes import token_bytes
from kdflow_core.data.chat import ChatFormat
from kdflow_core.errors import ModelError
from kdflow_core.models.folders import declared_end_ids
from kdflow_core.models.tokenizers import check_same_vocabulary, load_tokenizer, same_vocabulary
from tasks.stages.identity import made_of


def chat_format(run: RunConfig, side: str, folder: Path) -> ChatFormat:
    """How a side's model is spoken to, and how it ends its turns."""
    template: ChatTemplate = (run.teacher if side == "teacher" else run.student).chat_template
    trust = made_of(run, side).trust_remote_code
    return ChatFormat(
        tokenizer=load_tokenizer(folder, trust_remote_code=trust),
        template=template.template,
        args=template.args,
        date=template.date,
        declared_ends=declared_end_ids(folder),
    )


def aligns_by_bytes(run: RunConfig, student: ChatFormat, teacher: ChatFormat) -> bool:
    """Whether the two read a text as different tokens, or are taken as if they did."""
    if run.alignment != "auto":
        return run.alignment == "bytes"
    return not same_vocabulary(student.tokenizer, teacher.tokenizer)


def check_two_tokenizers(
    run: RunConfig, student: ChatFormat, teachers: Sequence[ChatFormat]
) -> None:
    """Refuse settings that mean nothing where all have one tokenizer; of several teachers, one that
    has another will do. Raises ModelError.
    """
    setting = run.of_two_tokenizers
    # Spans are there wherever tokens are aligned by bytes.
    if (
        setting
        and (run.loss.compared_by != "folded" or run.alignment != "bytes")
        and all(same_vocabulary(student.tokenizer, chat.tokenizer) for chat in teachers)
    ):
        sides = "student and teacher have" if len(teachers) == 1 else "all of the models have"
        raise ModelError(f"{setting} is for two tokenizers, and {sides} one; leave it out")


def check_pair(run: RunConfig, student: ChatFormat, teacher: ChatFormat) -> None:
    """Refuse models that cannot be compared on the same text. Raises ModelError."""
    if run.alignment == "exact":
        check_same_vocabulary(student.tokenizer, teacher.tokenizer)
    if aligns_by_bytes(run, student, teacher):
        try:
            check_aligned(run)
        except ValueError as error:
            raise ModelError(f"student and teacher have different vocabularies; {error}") from error
        for title, chat in (("student", student), ("teacher", teacher)):
            token_bytes(chat.tokenizer, title)
    if student.has_template == teacher.has_template:
        return
    lacking, other = ("teacher", "student") if student.has_template else ("student", "teacher")
    raise ModelError(
        f"the {lacking}'s tokenizer has no chat template, and the {other}'s has one: the same "
        f"conversation would be two different texts. Set {lacking}.chat_template.template, for "
        f"instance to the {other}'s"
    )
