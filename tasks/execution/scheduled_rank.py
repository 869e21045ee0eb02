"""A rank of a stage that a job scheduler has started: torchrun, Slurm, Kubernetes.

Its place among the ranks is in the environment, as torchrun has it there. Nobody watches over it
but the scheduler, which is to end all ranks when one has failed.
"""

import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pkgutil import resolve_name

import torch.distributed as dist

from configs.errors import ConfigError
from kdflow_core.workers.base import RankContext
from kdflow_core.workers.ports import free_port
from kdflow_core.workers.rank_side import ask_to_stop
from storage.artifact import ArtifactRef
from tasks.checks.run_check import PlannedRun
from tasks.execution.launch import stage_lease
from tasks.execution.progress import ProgressLog
from tasks.execution.termination import saving_before_the_end
from tasks.stages.catalogue import CATALOGUE
from tasks.stages.checkpoint_places import fetch_checkpoints
from tasks.stages.identity import StageSpec, find, open_store, stage_spec

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
JOB = "tasks.jobs.stage_host:do_job"
LOG = logging.getLogger("kdflow")


class LoggedReports:
    """Messages and progress of rank 0 as lines of a log. See `Reporter`."""

    def __init__(self, rank: int, pulse: Callable[[], None]) -> None:
        self._rank = rank
        self._pulse = pulse
        self._log = ProgressLog(LOG)

    def progress(
        self,
        *,
        done: int,
        total: int,
        unit: str,
        detail: str = "",
        figures: Mapping[str, float] | None = None,  # noqa: ARG002 - no launcher hears them here
    ) -> None:
        """See `Reporter`; what is logged is this rank's share."""
        self._pulse()
        event = {"event": "progress", "rank": 0, "done": done, "total": total}
        if self._rank == 0:
            self._log.event(event | {"unit": unit, "detail": detail})

    def message(self, text: str) -> None:
        """See `Reporter`."""
        if self._rank == 0:
            self._log.event({"event": "message", "text": text})


def context_of(environment: Mapping[str, str]) -> RankContext:
    """The place of this process among the ranks; alone, where the environment has none of it.

    Raises ConfigError, which names the variable.
    """
    if not any(name in environment for name in (*NUMBERS, *MEETING)):
        return RankContext(rendezvous=f"tcp://127.0.0.1:{free_port()}", address="127.0.0.1")
    lacking = [name for name in (*NUMBERS, *MEETING) if not environment.get(name)]
    if lacking:
        raise ConfigError(
            f"{', '.join(lacking)} is not set, of what tells a rank its place "
            f"({', '.join((*NUMBERS, *MEETING))}); torchrun sets them all"
        )
    for name in (*NUMBERS, "MASTER_PORT"):
        if not environment[name].isdecimal():
            raise ConfigError(f"{name}='{environment[name]}' is not a whole number from 0 on")
    rank, ranks, local = (int(environment[name]) for name in NUMBERS)
    if rank >= ranks:
        raise ConfigError(f"RANK={rank} is none of WORLD_SIZE={ranks} ranks, counted from 0")
    return RankContext(
        rank=rank,
        local_rank=local,
        num_ranks=ranks,
        rendezvous="env://",  # where torchrun keeps the meeting's store, it says so there
        address=socket.gethostname(),
    )


def spec_of(planned: PlannedRun, name: str) -> StageSpec:
    """What a stage of a run gets, its inputs taken from the store. Raises ConfigError."""
    run, stages = planned.run, planned.stages
    if run.mode == "onpolicy" and name == "train":
        raise ConfigError(
            "the rounds of mode=onpolicy have rollout engines beside the ranks; start them by "
            "kdflow run, over several nodes with workers.type=ray (docs/machines.md has a script "
            "for Slurm)"
        )
    if run.delivery == "auto":
        raise ConfigError("delivery=auto is decided by kdflow run; set delivery=replay or live")
    if name not in stages:
        raise ConfigError(f"this run has no stage '{name}'; it has {', '.join(stages)}")
    done: dict[str, ArtifactRef] = {}
    for earlier, identity in stages.items():
        if earlier == name:
            break
        ref = find(run, identity)
        if ref is None:
            raise ConfigError(
                f"the artifact of stage {earlier} is not in {run.storage.root} yet, which is "
                f"before {name}; run that first"
            )
        done[identity.output] = ref
    return stage_spec(stages[name], run, done)


def run_scheduled_rank(planned: PlannedRun, name: str, environment: Mapping[str, str]) -> None:
    """Do this rank's part of a stage, unless its artifact is there. A SIGTERM has training saved
    first. Raises ConfigError before anything else, StoppedError, and what the stage raises.
    """
    context, spec = context_of(environment), spec_of(planned, name)
    needed = CATALOGUE[spec.identity.stage].ranks(spec.run)
    if context.num_ranks != needed:
        raise ConfigError(
            f"WORLD_SIZE={context.num_ranks}, but stage {name} of this run has {needed} ranks; "
            "start so many, or set student.num_ranks or teacher.num_ranks"
        )
    if find(spec.run, spec.identity) is not None:
        LOG.info("the artifact of stage %s is there and intact", name)
        return
    with _alone(spec, context) as pulse, saving_before_the_end(ask_to_stop):
        resolve_name(JOB)(spec, LoggedReports(context.rank, pulse), context)
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _alone(spec: StageSpec, context: RankContext) -> Iterator[Callable[[], None]]:
    """Rank 0 holds the stage's lease for all; the others wait for it where they meet."""
    if context.rank != 0:
        yield lambda: None
        return
    with stage_lease(spec, LOG) as pulse:
        if find(spec.run, spec.identity) is not None:
            raise ConfigError("somebody else has made the artifact by now; start this again")
        open_store(spec.run).retract(spec.identity.kind, spec.identity.digest)
        fetch_checkpoints(spec, LOG.info)
        yield pulse.touch
