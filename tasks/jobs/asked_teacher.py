"""The teacher as benchmarks ask it: by the engine that serves it, over all ranks of a copy."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from configs.schema.engines import SglangEngine
from configs.schema.teacher import SglangTeacher
from kdflow_core.contracts import TeacherEngine, TokenSequence
from kdflow_core.errors import DataError
from kdflow_core.models.tokenizers import true_vocabulary_size
from kdflow_core.rollout import build_rollout_engine
from kdflow_core.rollout.base import Prompt, Sampling
from kdflow_core.teacher import build_engine, longest_allowed
from kdflow_core.teacher.streaming import stream_states
from kdflow_core.workers.devices import barrier
from tasks.jobs import parts
from tasks.jobs.chats import tokenizer
from tasks.jobs.stage_run import StageRun
from tasks.jobs.teacher_pass import WINDOW_BATCHES


class AskedTeacher:
    """See `Asked`. Its states and its answers come from engines of their own, of which one at a
    time is there; that of answers is rank 0's, over the devices of all.
    """

    def __init__(self, stage: StageRun, teacher: SglangTeacher) -> None:
        self._stage = stage
        self._teacher = teacher
        self._folder = stage.model_folder("teacher")
        self.max_length = longest_allowed(teacher, self._folder)
        self.head = parts.teacher_head(stage, parts.device(stage))
        self._engine: TeacherEngine | None = None

    def states(self, sequences: Sequence[TokenSequence]) -> Iterator[torch.Tensor]:
        """See `Asked`."""
        longest = max((len(sequence.ids_T) for sequence in sequences), default=0)
        if self._engine is None or self._engine.max_length < longest:
            self.close()
            self._engine = build_engine(
                self._teacher,
                folder=self._folder,
                head=self.head,
                longest=longest,
                device=parts.device(self._stage),
            )
        window = WINDOW_BATCHES * self._teacher.tokens_per_batch
        return stream_states(self._engine, sequences, window_tokens=window)

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[np.ndarray]:
        """See `Asked`. Raises DataError for a quantized teacher."""
        if self._teacher.quantization is not None:
            raise DataError(
                "eval.lm_eval.tasks: a task asks for answers, and the engine that writes them does "
                f"not know teacher.quantization={self._teacher.quantization}; leave it out"
            )
        self.close()
        barrier()  # all have left their devices
        return parts.agreed(lambda: self._written(prompts, sampling))

    def _written(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[np.ndarray]:
        stage, teacher = self._stage, self._teacher
        engine = build_rollout_engine(
            SglangEngine(dtype=teacher.dtype, tensor_parallel=teacher.ranks_per_replica),
            folder=self._folder,
            vocabulary_size=true_vocabulary_size(tokenizer(stage, "teacher")),
            max_length=max(len(prompt.ids_T) + prompt.max_new_tokens for prompt in prompts),
            device=parts.device(stage),
            trust_remote_code=stage.trusts("teacher"),
        )
        try:
            found = dict(engine.generate(prompts, sampling, seed=stage.run.seed))
        finally:
            engine.close()
        return [found[number].ids_N for number in range(len(prompts))]

    def close(self) -> None:
        """Leave the device."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
