"""The training schedule: every sequence once an epoch, however the work is divided."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdflow_core.batching import batch_by_tokens
from kdflow_core.student.schedule import BatchSchedule, learning_rate

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40)


def make_schedule(
    lengths: list[int], *, ranks: int = 1, batch: int = 8, budget: int = 64
) -> BatchSchedule:
    return BatchSchedule(
        lengths=np.array(lengths),
        supervised_counts=np.array(lengths) // 2,
        global_batch_size=batch,
        micro_batch_tokens=budget,
        num_ranks=ranks,
        seed=7,
        epochs=2,
        max_steps=None,
    )


def test_a_windowed_epoch_stays_within_its_groups() -> None:
    """Every sequence once; at any time at most a window's groups are visited; no two epochs alike;
    the same however many ranks there are.
    """
    groups = np.random.default_rng(0).integers(0, 20, 600)

    def order(ranks: int, epoch: int) -> list[int]:
        schedule = replace(make_schedule([10] * 600, ranks=ranks), groups=groups, window=4)
        first = epoch * schedule.steps_per_epoch
        return [i for k in range(schedule.steps_per_epoch) for i in schedule.sequences(first + k)]

    once = order(1, 0)
    assert sorted(once) == list(range(600))
    assert once == order(3, 0)
    assert once != order(1, 1)
    visits = [int(groups[i]) for i in once]
    met = list(dict.fromkeys(visits))
    bounds = np.cumsum([0, *np.bincount(groups, minlength=20)[met]])
    for k in range(0, 20, 4):
        assert len(set(visits[bounds[k] : bounds[k + 4]])) == 4
    assert visits[: bounds[4]] != sorted(visits[: bounds[4]])


@given(LENGTHS, st.integers(1, 5), st.integers(1, 9))
def test_an_epoch_sees_every_sequence_once_on_any_number_of_ranks(
    lengths: list[int], ranks: int, batch: int
) -> None:
    schedule = make_schedule(lengths, ranks=ranks, batch=batch)
    for epoch in range(2):
        seen: list[int] = []
        for step in range(schedule.steps_per_epoch):
            batches = schedule.step(epoch * schedule.steps_per_epoch + step)
            counts = {len(micro) for micro in batches.micro_batches}
            assert len(counts) == 1  # the ranks' collectives stay in step
            chosen = [i for rank in batches.micro_batches for micro in rank for i in micro]
            assert batches.num_tokens == sum(lengths[i] // 2 for i in chosen)
            assert sorted(chosen) == sorted(
                schedule.sequences(epoch * schedule.steps_per_epoch + step)
            )
            seen += chosen
        assert sorted(seen) == list(range(len(lengths)))


@given(LENGTHS, st.integers(10, 100))
def test_batches_stay_within_the_token_budget(lengths: list[int], budget: int) -> None:
    batches = batch_by_tokens(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_epochs_differ_and_are_repeatable() -> None:
    schedule, again = make_schedule(list(range(2, 60))), make_schedule(list(range(2, 60)))
    assert schedule.sequences(0) == again.sequences(0)
    assert schedule.sequences(0) != schedule.sequences(schedule.steps_per_epoch)


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [
        learning_rate(step=s, num_steps=11, peak=1.0, warmup_fraction=0.2, min_ratio=0.1)
        for s in range(11)
    ]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.55)  # half-way down the cosine from 1 to 0.1
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[2:]))


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(step=0, num_steps=5, peak=2.0, warmup_fraction=0.0, min_ratio=0.0) == 2.0
