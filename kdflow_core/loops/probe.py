"""How fast a teacher and a student's training are here: a few batches of each.

Dimensions: N supervised tokens, R rows of an output, H hidden size.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from configs.schema.student import StudentConfig
from kdflow_core.batching import select_rows
from kdflow_core.contracts import Examples, HiddenRows, TeacherEngine, TokenSequence
from kdflow_core.student.module import DistillationModule
from kdflow_core.student.optim import build_optimizers
from kdflow_core.student.schedule import BatchSchedule, StepBatches
from kdflow_core.student.step import training_step

TIMED_BATCHES = 2
TIMED_STEPS = 2
MICRO_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class TeacherProbe:
    """`tokens_per_s` of one copy of the teacher, and some of its states [N, H] on the CPU."""

    tokens_per_s: float
    states_NH: torch.Tensor


class RandomStates:
    """Random bfloat16 rows for every sequence: as good as real ones for timing."""

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size

    def begin_step(self, step: int) -> None:
        """Nothing to get ready."""

    def rows(self, sequence: TokenSequence) -> HiddenRows:
        """See `SignalSource`."""
        count = len(sequence.target_positions_N)
        states_NH = torch.randn(count, self.hidden_size, dtype=torch.bfloat16)
        return HiddenRows(buffer_RH=states_NH, index_N=torch.arange(count))


def probe_teacher(engine: TeacherEngine, sequences: Sequence[TokenSequence]) -> TeacherProbe:
    """Time some batches after the first. The ranks of one copy call it together."""
    lengths = [len(s.ids_T) for s in sequences]
    batches = [[sequences[i] for i in batch] for batch in engine.pack(lengths)]
    first = engine.forward(batches[0])  # what is compiled or allocated once is not counted
    states_NH = select_rows(
        first, hidden_size=first[0].buffer_RH.shape[1], device=torch.device("cpu")
    )
    timed = batches[1 : 1 + TIMED_BATCHES] or batches
    begin = time.perf_counter()
    for batch in timed:
        rows = engine.forward(batch)
        rows[-1].buffer_RH[-1:].cpu()  # it is finished when its last row is there
    seconds = time.perf_counter() - begin
    tokens = sum(len(s.ids_T) for batch in timed for s in batch)
    return TeacherProbe(tokens_per_s=tokens / seconds, states_NH=states_NH)


def probe_training(
    *,
    module: DistillationModule,
    schedule: BatchSchedule,
    examples: Examples,
    config: StudentConfig,
    rank: int,
    device: torch.device,
) -> float:
    """Student tokens per second over all ranks, which call it together. The student is spent."""
    optimizers = build_optimizers(module, config)
    module.train()
    states = [RandomStates(t.states_head.weight_VH.shape[1]) for t in module.algorithm.teachers]
    seconds, tokens = 0.0, 0
    for step in range(1 + TIMED_STEPS):
        batches = _shortened(schedule.step(step % schedule.num_steps), schedule)
        begin = time.perf_counter()
        training_step(
            module=module,
            optimizers=optimizers,
            batches=batches,
            examples=examples,
            states=states,
            rank=rank,
            config=config,
            device=device,
        )  # it ends with a number on the host, so it is finished
        if step:
            seconds += time.perf_counter() - begin
            tokens += batches.num_input_tokens
    return tokens / seconds


def _shortened(batches: StepBatches, schedule: BatchSchedule) -> StepBatches:
    """A step of a few micro-batches."""
    micro_batches = tuple(mine[:MICRO_BATCHES] for mine in batches.micro_batches)
    chosen = [i for mine in micro_batches for batch in mine for i in batch]
    return replace(
        batches,
        micro_batches=micro_batches,
        num_tokens=int(schedule.supervised_counts[chosen].sum()),
        num_input_tokens=int(schedule.lengths[chosen].sum()),
        num_positions=schedule.num_positions(micro_batches),
    )
