"""The parts around a teacher engine: packing, background writes, sleeping weights, live windows."""

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdflow_core.batching import pack_by_tokens
from kdflow_core.bounded import BoundedWorker
from kdflow_core.contracts import (
    HiddenRows,
    SignalRows,
    TargetRows,
    TeacherEngine,
    TokenSequence,
)
from kdflow_core.errors import AlignmentError
from kdflow_core.models.offload import OffloadedModule
from kdflow_core.student.timed import TimedSignals
from kdflow_core.teacher.live import LiveStates


@given(
    lengths=st.lists(st.integers(1, 50), max_size=30),
    budget=st.integers(1, 80),
    most=st.integers(1, 6),
)
def test_packing_keeps_to_its_budget_and_loses_nothing(
    lengths: list[int], budget: int, most: int
) -> None:
    batches = pack_by_tokens(lengths, budget, max_sequences=most)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= most
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)


def test_a_bounded_worker_makes_its_caller_wait() -> None:
    done: list[int] = []
    release = threading.Event()
    submitted = threading.Semaphore(0)

    worker = BoundedWorker(2)

    def submit_four() -> None:
        with worker:
            for number in range(4):
                worker.submit(lambda number=number: (release.wait(), done.append(number)))  # type: ignore[misc]
                submitted.release()

    caller = threading.Thread(target=submit_four)
    caller.start()
    assert submitted.acquire(timeout=10)
    assert submitted.acquire(timeout=10)
    assert not submitted.acquire(timeout=0.2)  # two are pending: the third waits
    assert worker.behind == 2
    release.set()
    caller.join(timeout=10)
    assert worker.behind == 0
    assert worker.waited_s >= 0.15
    assert done == [0, 1, 2, 3]


def test_what_training_waits_for_is_counted() -> None:
    class Slow:
        hidden_size = 3

        def begin_step(self, step: int) -> None:
            time.sleep(0.02 * step)

        def rows(self, sequence: TokenSequence) -> SignalRows:
            time.sleep(0.02)
            return TargetRows(log_prob_N=torch.zeros(len(sequence.target_ids_N)))

    timed = TimedSignals(Slow())
    timed.begin_step(2)
    assert timed.seconds >= 0.04
    before = timed.seconds
    time.sleep(0.02)
    assert timed.seconds == before
    sequence = TokenSequence(ids_T=np.arange(4), supervised_T=np.array([False, False, True, True]))
    rows = timed.rows(sequence)
    assert isinstance(rows, TargetRows)
    assert len(rows.log_prob_N) == 2
    assert timed.seconds >= before + 0.02


def test_an_error_behind_the_callers_back_is_raised() -> None:
    def fail() -> None:
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"), BoundedWorker(2) as worker:
        worker.submit(fail)


def test_tied_weights_sleep_and_wake_tied() -> None:
    embedding, head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
    head.weight = torch.nn.Parameter(embedding.weight[:].detach())  # another tensor, same storage
    model = torch.nn.Sequential(embedding, head)
    before = head.weight.detach().clone()
    offload = OffloadedModule(model)
    offload.sleep()
    assert head.weight.numel() == embedding.weight.numel() == 0
    offload.wake()
    torch.testing.assert_close(head.weight.detach(), before, rtol=0, atol=0)
    assert head.weight.data_ptr() == embedding.weight.data_ptr()


class CountingEngine(TeacherEngine):
    """Gives each sequence's length as its state, and notes what was asked of it."""

    max_length = 100

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pack(self, lengths: Sequence[int]) -> list[list[int]]:
        return [[i] for i in range(len(lengths))]

    def forward(self, sequences: Sequence[TokenSequence]) -> list[HiddenRows]:
        self.calls.append(f"forward {len(sequences[0].ids_T)}")
        state = torch.full((1, 1), float(len(sequences[0].ids_T)), dtype=torch.bfloat16)
        return [HiddenRows(buffer_RH=state, index_N=torch.zeros(1, dtype=torch.long))]

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")

    def close(self) -> None:
        pass


def sequence(length: int) -> TokenSequence:
    ids_T = np.arange(length, dtype=np.int32)
    return TokenSequence(ids_T=ids_T, supervised_T=ids_T == length - 1)


def test_several_steps_are_scored_between_one_waking_and_one_sleep() -> None:
    """Rank 0 of two that share the teacher: it runs both ranks' batches and keeps its own."""
    engine = CountingEngine()
    states = LiveStates(
        engine=engine,
        hidden_size=1,
        sequences_of=lambda step, rank: [sequence(2 + 10 * rank + step)],
        rank=0,
        ranks=[0, 1],
        num_steps=3,
        steps_at_once=2,
        sleep=True,
    )
    for step in range(3):
        states.begin_step(step)
        assert states.rows(sequence(2 + step)).buffer_RH.item() == 2 + step
    assert engine.calls == [
        *("wake", "forward 2", "forward 12", "forward 3", "forward 13", "sleep"),
        *("wake", "forward 4", "forward 14", "sleep"),
    ]
    with pytest.raises(AlignmentError, match=r"scored no sequence .* for steps 2 to 2"):
        states.rows(sequence(12))
