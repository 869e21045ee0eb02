"""A rank of an on-policy run: it holds student and teacher, or the rollout engine, between calls.

Started by `tasks.on_policy`. The first request says which it is
and gives the run; the others are calls of its methods. No Prefect here.
"""

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from kdflow_core.workers.rank_side import answer, receive_requests
from tasks.stages import StageSpec
from tasks.wiring.rollout_host import RolloutHost
from tasks.wiring.stage_run import StageRun
from tasks.wiring.trainer_host import TrainerHost
from tasks.worker import EventReporter, join_ranks, leave, prepare_rank, report_error


class HostRequest(BaseModel):
    """What a rank is to be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["trainer", "rollout"]
    spec: StageSpec


class Call(BaseModel):
    """A method of the host, and its arguments by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    arguments: dict[str, Any]


def main() -> int:
    """Serve calls until the launcher ends. Returns the exit code of one that has failed."""
    requests = receive_requests()
    first = HostRequest.model_validate_json(next(requests))
    rank = prepare_rank()
    try:
        stage = StageRun(first.spec, EventReporter(rank))
        if first.role == "trainer":
            join_ranks()
            host: TrainerHost | RolloutHost = TrainerHost(stage)
        else:
            host = RolloutHost(stage)
        answer(None)
        for request in requests:
            call = Call.model_validate_json(request)
            method: Callable[..., Any] = getattr(host, call.method)
            answer(method(**call.arguments))
    except Exception as error:  # noqa: BLE001 - the process boundary: all must reach the launcher
        report_error(error)
    return 1


if __name__ == "__main__":
    leave(main())
