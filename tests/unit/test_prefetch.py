"""Stored states are read before the step that needs them, and never too many of them."""

import threading

import numpy as np
import pytest
import torch

from kdflow_core.contracts import HiddenRows, TokenSequence
from kdflow_core.student.prefetch import STEPS_AHEAD, PrefetchedStates


def sequence(number: int) -> TokenSequence:
    return TokenSequence(ids_T=np.array([1, number]), supervised_T=np.array([False, True]))


class Source:
    """Notes what is read, and in which thread; fails for one sequence."""

    hidden_size = 1

    def __init__(self, broken: int | None = None) -> None:
        self.read: list[int] = []
        self.threads: set[str] = set()
        self._broken = broken

    def begin_step(self, step: int) -> None:
        pass

    def rows(self, sequence: TokenSequence) -> HiddenRows:
        number = int(sequence.ids_T[1])
        if number == self._broken:
            raise OSError("the disk is broken")
        self.read.append(number)
        self.threads.add(threading.current_thread().name)
        return HiddenRows(buffer_RH=torch.full((1, 1), float(number)), index_N=torch.arange(1))


def prefetched(source: Source, steps: int = 10) -> PrefetchedStates:
    return PrefetchedStates(
        source,
        sequences_of=lambda step: [sequence(2 * step), sequence(2 * step + 1)],
        num_steps=steps,
    )


def test_every_row_is_the_right_one_and_read_once_by_other_threads() -> None:
    source = Source()
    states = prefetched(source)
    for step in range(10):
        states.begin_step(step)
        for number in (2 * step, 2 * step + 1):
            assert states.rows(sequence(number)).buffer_RH.item() == number
    states.close()
    assert sorted(source.read) == list(range(20))
    assert threading.current_thread().name not in source.threads


def test_reading_is_ahead_by_so_many_steps_and_no_more() -> None:
    source = Source()
    states = prefetched(source)
    states.begin_step(4)  # a resumed run begins anywhere
    states.rows(sequence(8))
    states.close()
    assert set(source.read) <= set(range(8, 8 + 2 * (STEPS_AHEAD + 1)))
    ahead = prefetched(source := Source())
    ahead.begin_step(0)
    while len(source.read) < 2 * (STEPS_AHEAD + 1):
        pass  # they come without being asked for
    ahead.close()
    assert max(source.read) == 2 * (STEPS_AHEAD + 1) - 1


def test_an_error_is_raised_where_the_rows_are_asked_for() -> None:
    states = prefetched(Source(broken=5))
    states.begin_step(0)
    assert states.rows(sequence(0)).buffer_RH.item() == 0
    states.begin_step(2)
    with pytest.raises(OSError, match="the disk is broken"):
        states.rows(sequence(5))
    states.close()


def test_what_was_not_announced_is_read_all_the_same() -> None:
    states = prefetched(Source())
    states.begin_step(0)
    assert states.rows(sequence(17)).buffer_RH.item() == 17
    states.close()
