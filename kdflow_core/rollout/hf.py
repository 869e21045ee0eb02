"""The rollout engine in Hugging Face transformers: the reference, on any device.

Dimensions: N tokens of an answer.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from configs.schema.engines import TransformersEngine
from kdflow_core.errors import ModelError
from kdflow_core.models.loading import DTYPES, load_causal_lm
from kdflow_core.models.offload import OffloadedModule
from kdflow_core.rollout.base import Completion, Prompt, Sampling
from kdflow_core.rollout.decoding import Answer, generate_ids
from kdflow_core.weight_buckets import Bucket, missing_text


class TransformersRolloutEngine:
    """Batches of prompts, each as long as its longest answer takes; nothing is cut."""

    def __init__(
        self,
        config: TransformersEngine,
        *,
        folder: Path,
        vocabulary_size: int,
        max_length: int,  # noqa: ARG002 - a model without a cache of its own needs no sizes
        device: torch.device,
        trust_remote_code: bool,
    ) -> None:
        model = load_causal_lm(
            folder,
            dtype=DTYPES[config.dtype],
            attention=config.attention,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        self.version = 0
        self._model: PreTrainedModel | None = model
        self._offload = OffloadedModule(model)
        self._vocabulary_size = vocabulary_size
        self._batch_size = config.prompts_per_batch
        self._missing: set[str] = set()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        places: Sequence[int] | None = None,
        enough: float = 1.0,  # noqa: ARG002 - a batch ends as a whole
    ) -> Iterator[tuple[int, Completion]]:
        """See `RolloutEngine`."""
        model = self._running()
        places = range(len(prompts)) if places is None else places
        for begin in range(0, len(prompts), self._batch_size):
            batch = prompts[begin : begin + self._batch_size]
            torch.manual_seed(_batch_seed(seed, places[begin]))
            answers = generate_ids(
                model=model,
                vocabulary_size=self._vocabulary_size,
                prompts=batch,
                sampling=sampling,
            )
            for row, answer in enumerate(answers):
                yield begin + row, self._completion(answer, sampling)

    def _completion(self, answer: Answer, sampling: Sampling) -> Completion:
        stopped = int(answer.ids_N[-1]) in sampling.stop_ids
        return Completion(
            ids_N=answer.ids_N,
            log_prob_N=answer.log_prob_N,
            finish_reason="stop" if stopped else "length",
            version=self.version,
        )

    def begin_weights(self) -> None:
        """See `RolloutEngine`."""
        model = self._running()
        self.wake()
        self._missing = set(dict(model.named_parameters()))

    @torch.no_grad()
    def load_weights(self, bucket: Bucket) -> None:
        """See `RolloutEngine`."""
        parameters = dict(self._running().named_parameters())
        for name, tensor in bucket.open():
            if name not in parameters:
                raise ModelError(f"the rollout engine's model has no parameter '{name}'")
            parameters[name].copy_(tensor)
            self._missing.discard(name)

    def end_weights(self, version: int) -> None:
        """See `RolloutEngine`."""
        if self._missing:
            raise ModelError(missing_text(sorted(self._missing)))
        self.version = version
        self._offload.changed()

    def sleep(self) -> None:
        """See `RolloutEngine`."""
        self._offload.sleep()

    def wake(self) -> None:
        """See `RolloutEngine`."""
        self._offload.wake()

    def close(self) -> None:
        """See `RolloutEngine`."""
        self._model = None
        self._offload.close()

    def _running(self) -> PreTrainedModel:
        if self._model is None:
            raise ModelError("the rollout engine is closed")
        return self._model


def _batch_seed(seed: int, place: int) -> int:
    """That of the batch whose first prompt has this place."""
    if place == 0:
        return seed
    return int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0] >> 1)
