"""The rollout engine in SGLang: continuous batching, in processes of its own.

Dimensions: N tokens of an answer.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from configs.schema.engines import SglangEngine
from configs.schema.rollout import SglangRollout
from kdflow_core.errors import ModelError
from kdflow_core.models.folders import context_length
from kdflow_core.rollout.base import Completion, FinishReason, Prompt, Sampling
from kdflow_core.sglang_runtime.versions import require_sglang
from kdflow_core.weight_buckets import Bucket

if TYPE_CHECKING:
    from kdflow_core.sglang_runtime.engine import GenerationEngine

SLACK = 8
FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "cut"}


class SglangRolloutEngine:
    """An engine that samples from the true vocabulary alone and reports its weights' version."""

    def __init__(
        self,
        config: SglangEngine,
        *,
        folder: Path,
        vocabulary_size: int,
        max_length: int,
        device: torch.device,
        trust_remote_code: bool,
    ) -> None:
        require_sglang()
        sleeps = isinstance(config, SglangRollout) and config.sleep
        if sleeps and device.type == "cpu":
            raise ModelError(
                "on_policy.rollout.sleep gives back the memory of a GPU, and this engine runs on a "
                "CPU; leave it out"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kernels that other hardware has
            from kdflow_core.sglang_runtime.engine import (  # noqa: PLC0415 - takes 10 s
                EngineOptions,
                GenerationEngine,
            )
        self._engine: GenerationEngine | None = GenerationEngine(
            EngineOptions(
                folder=folder,
                trust_remote_code=trust_remote_code,
                dtype=config.dtype,
                vocabulary_size=vocabulary_size,
                # SGLang keeps some of its context free; the model's own is the limit.
                max_length=min(max_length + SLACK, context_length(folder)),
                tensor_parallel=config.tensor_parallel,
                first_gpu=config.first_gpu,
                max_running=config.max_running,
                cache_tokens=config.cache_tokens,
                memory_fraction=config.memory_fraction,
                attention_backend=config.attention_backend,
                sleep=sleeps,
            ),
            device,
        )
        self.version = 0
        self._sleeps = sleeps
        self._has_weights = True

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        places: Sequence[int] | None = None,
        enough: float = 1.0,
    ) -> Iterator[tuple[int, Completion]]:
        """See `RolloutEngine`. Raises ModelError after a sleep, until new weights have come."""
        if not self._has_weights:
            raise ModelError(
                "the rollout engine has slept, which takes its weights; it answers when new ones "
                "have come"
            )
        places = range(len(prompts)) if places is None else places
        # One of 63 bits for each answer, as SGLang takes them.
        count = max(places, default=-1) + 1
        seeds = np.random.SeedSequence(seed).generate_state(count, np.uint64) >> np.uint64(1)
        answers = self._running().generate(
            [prompt.ids_T.tolist() for prompt in prompts],
            [
                _parameters(sampling, prompt.max_new_tokens) | {"sampling_seed": int(own)}
                for prompt, own in zip(prompts, seeds[list(places)], strict=True)
            ],
            log_probs=sampling.log_probs,
            enough=enough,
        )
        return (
            (number, self._completion(answer, sampling))
            for number, answer in answers
            if answer["output_ids"]
        )

    def _completion(self, answer: dict[str, Any], sampling: Sampling) -> Completion:
        info = answer["meta_info"]
        ids = answer["output_ids"]
        versions = {span["version"] for span in info["weight_versions"] or ()}
        if len(versions) > 1:
            raise ModelError(f"SGLang gave an answer by the weights {sorted(versions)}")
        served = info["weight_version"]
        # An answer that ends in the step in which it is aborted has ended all the same.
        stopped = ids[-1] in sampling.stop_ids
        return Completion(
            ids_N=np.array(ids, np.int32),
            log_prob_N=_log_probs(info, len(ids)) if sampling.log_probs else None,
            finish_reason="stop" if stopped else FINISH[info["finish_reason"]["type"]],
            version=0 if served == "default" else int(served),
        )

    def begin_weights(self) -> None:
        """See `RolloutEngine`."""
        engine = self._running()
        engine.wake_weights()
        engine.begin_weights()

    def load_weights(self, bucket: Bucket) -> None:
        """See `RolloutEngine`. The engine's own processes open the bucket."""
        self._running().load_weights(asdict(bucket))

    def join_broadcast(self, address: str, port: int, *, first: int, ranks: int) -> None:
        """Meet the sender of `receive_weights`, in a group of so many `ranks`; those of this engine
        begin with `first`.
        """
        self._running().join_broadcast(address, port, first=first, ranks=ranks)

    def receive_weights(self, names: list[str], dtypes: list[str], shapes: list[list[int]]) -> None:
        """Like `load_weights`, but from the group's sender."""
        self._running().receive_weights(names, dtypes, shapes)

    def end_weights(self, version: int) -> None:
        """See `RolloutEngine`."""
        self._running().end_weights(version)
        self.version, self._has_weights = version, True

    def sleep(self) -> None:
        """See `RolloutEngine`. The weights are let go of: after `wake`, new ones have to come."""
        if self._sleeps:
            self._running().sleep()
            self._has_weights = False

    def wake(self) -> None:
        """See `RolloutEngine`."""
        self._running().wake()

    def close(self) -> None:
        """See `RolloutEngine`."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _running(self) -> "GenerationEngine":
        if self._engine is None:
            raise ModelError("the rollout engine is closed")
        return self._engine


def _log_probs(info: dict[str, Any], count: int) -> np.ndarray:
    entries = info["output_token_logprobs"]
    if len(entries) != count:
        raise ModelError(
            f"SGLang gave an answer of {count} tokens with {len(entries)} log-probabilities"
        )
    return np.array([entry[0] for entry in entries], np.float32)


def _parameters(sampling: Sampling, max_new_tokens: int) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": list(sampling.stop_ids),
    }
