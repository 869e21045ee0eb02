"""The training schedule: every sequence once an epoch, however the work is divided."""

import itertools
import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import get_scheduler

from configs.schema.student import Schedule, StudentConfig
from kdflow_core.batching import PASS_SHARE, Division, batch_by_tokens
from kdflow_core.student.rates import rate_factor
from kdflow_core.student.schedule import BatchSchedule

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40)


def make_schedule(
    lengths: list[int],
    *,
    ranks: int = 1,
    batch: int = 8,
    budget: int = 64,
    packed: bool = False,
) -> BatchSchedule:
    return BatchSchedule(
        lengths=np.array(lengths),
        supervised_counts=np.array(lengths) // 2,
        global_batch_size=batch,
        division=Division(tokens=budget, packed=packed, attention_length=100),
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


@given(LENGTHS, st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_an_epoch_sees_every_sequence_once_on_any_number_of_ranks(
    lengths: list[int], ranks: int, batch: int, packed: bool
) -> None:
    schedule = make_schedule(lengths, ranks=ranks, batch=batch, packed=packed)
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


@given(st.lists(st.integers(1, 90), min_size=1, max_size=9), st.integers(10, 200))
def test_batches_have_the_least_area_of_all_ways_to_cut_the_sorted_lengths(
    lengths: list[int], budget: int
) -> None:
    def cost(batches: list[list[int]]) -> int:
        each = budget // PASS_SHARE
        return sum(len(batch) * max(batch) + each for batch in batches)

    ordered, costs = sorted(lengths, reverse=True), []
    for cuts in itertools.product([False, True], repeat=len(ordered) - 1):
        batches = [[ordered[0]]]
        for length, cut in zip(ordered[1:], cuts, strict=True):
            batches = [*batches, [length]] if cut else [*batches[:-1], [*batches[-1], length]]
        if all(len(b) == 1 or len(b) * max(b) <= budget for b in batches):
            costs.append(cost(batches))
    found = [[lengths[i] for i in batch] for batch in batch_by_tokens(lengths, budget)]
    assert cost(found) == min(costs)
    assert [max(batch) for batch in found] == sorted(map(max, found), reverse=True)


@given(LENGTHS, st.integers(10, 100), st.integers(1, 60))
def test_sequences_above_what_may_be_batched_are_alone(
    lengths: list[int], budget: int, longest: int
) -> None:
    batches = batch_by_tokens(lengths, budget, longest)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 for b in batches if max(lengths[i] for i in b) > longest)


@given(LENGTHS, st.integers(10, 100), st.integers(1, 60) | st.none(), st.integers(1, 9))
def test_packed_batches(lengths: list[int], budget: int, longest: int | None, least: int) -> None:
    """Within the budget, without padding, not more than a sequence each, and hardly more batches
    than the tokens fill; about as dear as one another.
    """
    lengths_N = np.array(lengths)
    division = Division(tokens=budget, packed=True, batched_length=longest, attention_length=50)
    batches = division.batches(lengths_N, least=least)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batches)
    together = [b for b in batches if len(b) > 1]
    for batch in together:
        assert sum(lengths[i] for i in batch) <= budget
        assert longest is None or max(lengths[i] for i in batch) <= longest
    assert division.positions(batches, lengths_N) == sum(lengths)
    alone = sum(length > min(budget, longest or budget) for length in lengths)
    enough = max(2 * math.ceil(sum(lengths) / budget), least)  # half full, at the worst
    assert len(batches) <= alone + enough
    assert len(batches) >= min(least, len(lengths))


def test_ranks_and_batches_have_equal_costs_not_equal_tokens() -> None:
    """One long sequence costs as much as more tokens in short ones."""
    lengths = np.array([1000] + [100] * 20)
    division = Division(tokens=4000, packed=True, attention_length=1000)
    schedule = replace(
        make_schedule(lengths.tolist(), ranks=2, batch=21), division=division, epochs=1
    )
    costs = [
        sum(division.costs(lengths[list(batch)]).sum() for batch in mine)
        for mine in schedule.step(0).micro_batches
    ]
    assert max(costs) - min(costs) <= 110
    tokens = [lengths[list(mine[0])].sum() for mine in schedule.step(0).micro_batches]
    assert max(tokens) - min(tokens) >= 500


def test_epochs_differ_and_are_repeatable() -> None:
    schedule, again = make_schedule(list(range(2, 60))), make_schedule(list(range(2, 60)))
    assert schedule.sequences(0) == again.sequences(0)
    assert schedule.sequences(0) != schedule.sequences(schedule.steps_per_epoch)


def rates(num_steps: int, **fields: Any) -> list[float]:
    model = {"type": "pretrained", "path": "."}
    config = StudentConfig.model_validate({"model": model, "max_steps": num_steps, **fields})
    return [rate_factor(config, step=s, num_steps=num_steps) for s in range(num_steps)]


def test_the_learning_rate_warms_up_and_decays() -> None:
    found = rates(11, warmup_fraction=0.2)
    assert found[:3] == [0.5, 1.0, 1.0]
    assert found[6] == pytest.approx(0.55)  # half-way down the cosine from 1 to 0.1
    assert found[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(found[2:]))
    assert rates(5, warmup_fraction=0.0)[0] == 1.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lr_schedule": "constant"}, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"lr_schedule": "linear", "min_lr_ratio": 0.0}, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"lr_schedule": "linear", "min_lr_ratio": 0.2}, [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        (
            {"lr_schedule": "wsd", "min_lr_ratio": 0.0, "decay_fraction": 0.5},
            [0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0],
        ),
    ],
)
def test_the_learning_rate_has_the_shape_that_is_asked_for(
    fields: dict[str, Any], expected: list[float]
) -> None:
    assert rates(7, warmup_steps=2, **fields) == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize(
    ("fields", "theirs"),
    [
        ({"lr_schedule": "cosine"}, {}),
        ({"lr_schedule": "linear"}, {}),
        ({"lr_schedule": "cosine_with_restarts"}, {}),
        ({"lr_schedule": "cosine_with_restarts", "lr_cycles": 3}, {"num_cycles": 3}),
        ({"lr_schedule": "polynomial"}, {"lr_end": 0.0}),
        ({"lr_schedule": "polynomial", "lr_power": 2.5}, {"lr_end": 0.0, "power": 2.5}),
        ({"lr_schedule": "inverse_sqrt"}, {}),
    ],
)
def test_schedules_are_those_of_transformers(
    fields: dict[str, Any], theirs: dict[str, Any], warmup: int
) -> None:
    """After the rise; theirs come to their end one step after the last one, ours in it."""
    num_steps = 41
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        fields["lr_schedule"], optimizer, num_warmup_steps=warmup,
        num_training_steps=num_steps - 1, scheduler_specific_kwargs=theirs,
    )  # fmt: skip
    expected = []
    for _ in range(num_steps):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    found = rates(num_steps, warmup_steps=warmup, min_lr_ratio=0.0, **fields)
    assert found[warmup:] == pytest.approx(expected[warmup:], abs=1e-12)


@pytest.mark.parametrize("shape", get_args(Schedule))
@pytest.mark.parametrize("num_steps", [1, 2, 3, 50])
def test_a_learning_rate_is_positive_and_at_most_the_peak(shape: str, num_steps: int) -> None:
    found = rates(num_steps, lr_schedule=shape, warmup_steps=1)
    assert all(0.1 - 1e-12 <= rate <= 1 for rate in found)
    assert found[0] == 1.0


def test_a_rise_that_contradicts_the_steps_is_refused() -> None:
    with pytest.raises(ValidationError, match="one of warmup_steps and warmup_fraction"):
        rates(5, warmup_steps=1, warmup_fraction=0.1)
    with pytest.raises(ValidationError, match="warmup_steps=9 is more than max_steps=5"):
        rates(5, warmup_steps=9)
