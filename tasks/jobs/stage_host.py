"""The host of a stage's ranks: it does the stage's job once, and reports."""

import sys
import time
from collections.abc import Callable, Mapping
from pkgutil import resolve_name

from configs.secrets import public
from kdflow_core.allocator import keep_large_blocks
from kdflow_core.sinks import Reporter
from kdflow_core.workers.base import RankContext, offered
from kdflow_core.workers.rank_side import emit, made_progress
from storage.artifact import ArtifactRef
from tasks.jobs.stage_run import StageRun
from tasks.stages.catalogue import CATALOGUE
from tasks.stages.identity import StageSpec

PROGRESS_INTERVAL_S = 1.0


class EventReporter:
    """Progress and messages as events. Messages are rank 0's; progress is every rank's own share,
    which the receiver adds up.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._last = 0.0

    def progress(
        self,
        *,
        done: int,
        total: int,
        unit: str,
        detail: str = "",
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """See `Reporter`; at most one event a second, and the last one always."""
        made_progress()
        now = time.monotonic()
        if now - self._last < PROGRESS_INTERVAL_S and done != total:
            return
        self._last = now
        event = {"event": "progress", "rank": self._rank, "done": done, "total": total}
        event |= {"unit": unit, "detail": detail, "gpu_bytes": _gpu_bytes()}
        emit(event | {"figures": dict(figures or {})})

    def message(self, text: str) -> None:
        """See `Reporter`."""
        if self._rank == 0:
            emit({"event": "message", "text": public(text)})


def _gpu_bytes() -> int | None:
    """What torch holds of this rank's GPU, where it uses one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.memory_reserved())


def open_stage(context: RankContext, spec: str) -> StageRun:
    """The stage of a spec in JSON, with its reports as events."""
    return StageRun(StageSpec.model_validate_json(spec), EventReporter(context.rank), context)


class StageHost:
    """A rank of a stage."""

    def __init__(self, context: RankContext, spec: str) -> None:
        self._stage = open_stage(context, spec)

    @offered
    def work(self) -> None:
        """Do the job. What it has made is in the store."""
        _do(self._stage)

    def close(self) -> None:
        """Nothing is left to be done."""


def do_job(spec: StageSpec, reporter: Reporter, context: RankContext) -> None:
    """Do this process's part of a stage, where no launcher has started it."""
    _do(StageRun(spec, reporter, context))


def _do(stage: StageRun) -> None:
    if stage.context.num_ranks == 1:
        keep_large_blocks()
    job_of(stage.spec.identity.stage)(stage)


def job_of(stage: str) -> Callable[[StageRun], ArtifactRef | None]:
    """The job of a stage; loaded when it is asked for, with no more than it needs."""
    found: Callable[[StageRun], ArtifactRef | None] = resolve_name(CATALOGUE[stage].job)
    return found
