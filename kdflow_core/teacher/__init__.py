"""Teacher engines: token ids in, post-norm hidden states of the supervised rows out."""

from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType

import torch

from configs.schema.teacher import Teacher
from kdflow_core.contracts import OutputHead, TeacherEngine
from kdflow_core.models.folders import context_length

# Lazy, so that a backend's libraries are loaded by those who use it.
ENGINES: Mapping[str, str] = MappingProxyType(
    {
        "transformers": "kdflow_core.teacher.hf:TransformersTeacherEngine",
        "sglang": "kdflow_core.teacher.sglang:SglangTeacherEngine",
        "sglang_server": "kdflow_core.teacher.server:SglangServerEngine",
    }
)


def longest_allowed(config: Teacher, folder: Path) -> int:
    """The longest sequence that the teacher takes, in tokens."""
    own_length = context_length(folder)
    return min(own_length, config.context_length or own_length)


def build_engine(
    config: Teacher, *, folder: Path, head: OutputHead, longest: int, device: torch.device
) -> TeacherEngine:
    """The engine that `config` names, over the model in `folder`.

    It takes sequences of up to `longest` tokens. Raises ModelError.
    """
    engine: TeacherEngine = resolve_name(ENGINES[config.type])(
        config, folder=folder, head=head, longest=longest, device=device
    )
    return engine
