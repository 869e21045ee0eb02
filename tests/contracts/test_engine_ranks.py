"""What SGLang's engine would serve although it should not: weights that failed to reach the second
of its ranks, of which SGLang hears the first one alone, and none at all, after a sleep. And which
models it has.
"""

import importlib
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.schema.rollout import SglangRollout
from kdflow_core.errors import ModelError
from kdflow_core.rollout import build_rollout_engine
from kdflow_core.rollout.base import Prompt, Sampling
from kdflow_core.sglang_runtime.versions import check_architecture
from kdflow_core.weight_buckets import BucketFile
from tests.conftest import VOCABULARY

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def sglang(name: str) -> ModuleType:
    """A module that loads SGLang: it takes 10 s, and what it loads is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def test_sources_say_which_models_there_are() -> None:
    """Planning reads them, as loading SGLang takes long."""
    sglang("kdflow_core.sglang_runtime.engine")
    registry = sglang("sglang.srt.models.registry").ModelRegistry
    loaded = registry.get_supported_archs()
    assert len(loaded) > 100
    for architecture in loaded:
        check_architecture(architecture)
    with pytest.raises(ModelError, match="does not run BioGptForCausalLM"):
        check_architecture("BioGptForCausalLM")


def test_what_fails_on_the_second_rank_is_an_error_and_is_not_served(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty_rank = sglang("tests.contracts.faulty_rank")
    front = sglang("kdflow_core.sglang_runtime.engine")
    monkeypatch.setattr(front, "scheduler_for", faulty_rank.scheduler_for)
    engine = build_rollout_engine(
        SglangRollout(dtype="float32", max_running=4, tensor_parallel=2),
        folder=student_folder,
        vocabulary_size=VOCABULARY,
        max_length=64,
        device=torch.device("cpu"),
    )
    try:
        asked = [Prompt(ids_T=np.arange(3, 9, dtype=np.int32), max_new_tokens=4)]
        before = dict(engine.generate(asked, Sampling(stop_ids=(), temperature=0.0), seed=0))
        assert len(before[0].ids_N) == 4
        engine.begin_weights()
        bucket = BucketFile().write(sorted(load_file(student_folder / "model.safetensors").items()))
        with pytest.raises(ModelError, match=r"rank 1: .*nowhere"):
            engine.load_weights(bucket)
        with pytest.raises(ModelError, match=r"rank 1: .*did not arrive"):
            engine.end_weights(1)
        assert engine.version == 0
    finally:
        engine.close()


class Sleeper:
    """Stands for SGLang's engine on a GPU: on a CPU there is none that sleeps."""

    def __init__(self, *_: Any) -> None: ...

    def generate(self, *_: Any, **__: Any) -> list[Any]:
        return []

    def sleep(self) -> None: ...

    wake = wake_weights = begin_weights = close = sleep

    def end_weights(self, version: int) -> None: ...


def test_an_engine_that_woke_without_weights_does_not_answer(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang("kdflow_core.sglang_runtime.engine"), "GenerationEngine", Sleeper)
    engine = build_rollout_engine(
        SglangRollout(sleep=True),
        folder=student_folder,
        vocabulary_size=VOCABULARY,
        max_length=64,
        device=torch.device("cuda"),
    )

    def answer() -> None:
        list(engine.generate([], Sampling(stop_ids=()), seed=0))

    answer()
    engine.sleep()
    engine.wake()
    with pytest.raises(ModelError, match="has slept, which takes its weights"):
        answer()
    engine.begin_weights()
    engine.end_weights(1)
    answer()
