"""A stage's tokenizers, and how its models are spoken to. Loads no model code."""

from transformers import PreTrainedTokenizerBase

from kdflow_core.data.chat import ChatFormat
from kdflow_core.models.tokenizers import load_tokenizer
from tasks.checks.chat_check import chat_format
from tasks.jobs.stage_run import StageRun
from tasks.stages.slices import Side


def tokenizer(stage: StageRun, side: Side) -> PreTrainedTokenizerBase:
    """The tokenizer of a side's model."""
    return load_tokenizer(stage.model_folder(side), trust_remote_code=stage.trusts(side))


def chat(stage: StageRun, side: Side) -> ChatFormat:
    """How a side's model is spoken to, and how it ends its turns."""
    return chat_format(stage.run, side, stage.model_folder(side))
