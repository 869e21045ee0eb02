"""Rollout engines: prompts' ids in, answers' ids with their log-probabilities out."""

from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType

import torch

from configs.schema.engines import Engine, SglangEngine
from kdflow_core.rollout.base import RolloutEngine

# Lazy, so that a backend's libraries are loaded by those who use it.
ENGINES: Mapping[str, str] = MappingProxyType(
    {
        "transformers": "kdflow_core.rollout.hf:TransformersRolloutEngine",
        "sglang": "kdflow_core.rollout.sglang:SglangRolloutEngine",
    }
)


def placed(engine: Engine, rank: int | None) -> Engine:
    """The engine of a rank of several: its copy of the model has GPUs of its own; with None, the
    only ones that it sees.
    """
    if not isinstance(engine, SglangEngine):
        return engine
    first = 0 if rank is None else engine.first_gpu + rank * engine.tensor_parallel
    return engine.model_copy(update={"first_gpu": first})


def build_rollout_engine(
    config: Engine,
    *,
    folder: Path,
    vocabulary_size: int,
    max_length: int,
    device: torch.device,
    trust_remote_code: bool = False,
) -> RolloutEngine:
    """The engine that `config` names, over the model in `folder`.

    It samples from the first `vocabulary_size` tokens, and takes prompts with answers of up to
    `max_length` tokens in all. Raises ModelError.
    """
    engine: RolloutEngine = resolve_name(ENGINES[config.type])(
        config,
        folder=folder,
        vocabulary_size=vocabulary_size,
        max_length=max_length,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    return engine
