"""An engine over two ranks, of which SGLang itself hears the first one alone."""

import importlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.schema.rollout import SglangRollout
from kdflow_core.errors import ModelError
from kdflow_core.rollout import build_rollout_engine
from kdflow_core.rollout.base import Prompt, Sampling
from kdflow_core.weight_buckets import BucketFile
from tests.conftest import VOCABULARY

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_what_fails_on_the_second_rank_is_an_error_and_is_not_served(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # takes 10 s, and what it loads is deprecated
        faulty_rank = importlib.import_module("tests.contracts.faulty_rank")
        front = importlib.import_module("kdflow_core.sglang_runtime.engine")
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
