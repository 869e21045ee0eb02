"""How a run's models are spoken to, and whether both read the same. Loads no model code."""

from pathlib import Path

from configs.schema.models import ChatTemplate
from configs.schema.run import RunConfig
from kdflow_core.data.chat import ChatFormat
from kdflow_core.errors import ModelError
from kdflow_core.models.folders import declared_end_ids
from kdflow_core.models.tokenizers import check_same_vocabulary, load_tokenizer
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


def check_pair(student: ChatFormat, teacher: ChatFormat) -> None:
    """Refuse models that read the same text as different tokens. Raises ModelError."""
    check_same_vocabulary(student.tokenizer, teacher.tokenizer)
    if student.has_template == teacher.has_template:
        return
    lacking, other = ("teacher", "student") if student.has_template else ("student", "teacher")
    raise ModelError(
        f"the {lacking}'s tokenizer has no chat template, and the {other}'s has one: the same "
        f"conversation would be two different texts. Set {lacking}.chat_template.template, for "
        f"instance to the {other}'s"
    )
