"""Which delivery is cheaper, from an estimate."""

from collections.abc import Callable
from pathlib import Path

import pytest

from configs.load import load_run
from configs.schema.run import RunConfig
from kdflow_core.errors import DataError
from tasks.forecast.estimate import Estimate, check_room, prospect, with_delivery

GB = 10**9


def estimate(**changes: object) -> Estimate:
    """The teacher takes 100 s to store its states, 40 s a run when live; training takes 200 s."""
    fields: dict[str, object] = {
        "sequences": 1000,
        "replay_tokens": 100_000,
        "live_tokens": 40_000,
        "rows": 1_000_000,
        "student_tokens": 100_000,
        "steps": 10,
        "teacher_rate": 1000.0,
        "student_rate": 500.0,
        "row_bytes": {"raw": 1000.0, "planes": 700.0, "int8": 500.0},
        "int8_kl": 1e-4,
        "device_bytes": None,
        "teacher_peak_bytes": None,
        "student_peak_bytes": None,
    }
    return Estimate.model_validate(fields | changes)


@pytest.fixture
def run(make_recipe: Callable[..., Path]) -> Callable[..., RunConfig]:
    return lambda **overrides: load_run(
        str(make_recipe()), {k.replace("__", "."): v for k, v in overrides.items()}
    )


@pytest.mark.parametrize(("runs", "delivery"), [(1, "live"), (2, "live"), (3, "replay")])
def test_the_more_runs_share_the_states_the_better_is_replay(
    run: Callable[..., RunConfig], runs: int, delivery: str
) -> None:
    outcome = prospect(run(delivery="auto", planned_runs=runs), estimate(), 2 * GB)
    assert outcome.extract_s == 100
    assert (outcome.replay_s, outcome.live_s) == (100 + runs * 200, runs * 240)
    assert outcome.delivery == delivery
    assert outcome.stored_bytes == {"raw": GB, "planes": 7 * GB // 10, "int8": GB // 2}


def test_more_copies_of_the_teacher_store_its_states_sooner(
    run: Callable[..., RunConfig],
) -> None:
    config = run(teacher__num_ranks=2, teacher__num_workers=2, student__num_ranks=4)
    outcome = prospect(config, estimate(), None)
    assert (outcome.extract_s, outcome.live_teacher_s) == (25, 10)


def test_of_spans_alone_four_bytes_a_token_are_stored(run: Callable[..., RunConfig]) -> None:
    config = run(planned_runs=9, loss__span_share=1)
    outcome = prospect(config, estimate(), GB - 1)
    assert (outcome.fits, outcome.delivery) == (True, "replay")
    assert outcome.stored_bytes["raw"] == 4_000_000


def test_what_does_not_fit_the_disk(run: Callable[..., RunConfig]) -> None:
    config = run(planned_runs=9)
    outcome = prospect(config, estimate(), GB - 1)
    assert (outcome.fits, outcome.delivery) == (False, "live")
    with pytest.raises(
        DataError, match=r"take 1\.000 GB as raw.*1\.000 GB free; set storage\.codec"
    ):
        check_room(config, outcome)
    check_room(run(planned_runs=9, storage__check_room=False), outcome)
    smaller = run(planned_runs=9, storage__codec="int8")
    assert prospect(smaller, estimate(), GB - 1).delivery == "replay"


@pytest.mark.parametrize(
    ("overrides", "measured", "reason"),
    [
        ({"student__shuffle_window_shards": 4}, {}, "asks for stored states"),
        (
            {"teacher__type": "sglang", "teacher__tensor_parallel": 2, "teacher__num_ranks": 2},
            {},
            "1 training ranks cannot hold a teacher over 2",
        ),
        (
            {},
            {"device_bytes": 10, "teacher_peak_bytes": 6, "student_peak_bytes": 5},
            "do not fit the device together",
        ),
    ],
)
def test_where_live_is_not_possible(
    run: Callable[..., RunConfig],
    overrides: dict[str, object],
    measured: dict[str, object],
    reason: str,
) -> None:
    outcome = prospect(run(delivery="auto", **overrides), estimate(**measured), 2 * GB)
    assert outcome.delivery == "replay"
    assert reason in outcome.reason


def test_a_sleeping_teacher_shares_the_device(run: Callable[..., RunConfig]) -> None:
    config = run(delivery="auto", teacher__sleep=True)
    peaks = {"device_bytes": 10, "teacher_peak_bytes": 6, "student_peak_bytes": 5}
    assert prospect(config, estimate(**peaks), 2 * GB).delivery == "live"
    assert with_delivery(config, "live").teacher.sleep  # type: ignore[union-attr]
    assert not with_delivery(config, "replay").teacher.sleep  # type: ignore[union-attr]
