"""Run one stage in ranks, unless its artifact is there already."""

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from configs.printable import printable
from configs.schema.run import RunConfig
from configs.schema.workers import RayWorkers
from configs.secrets import public
from kdflow_core.errors import WorkerError
from kdflow_core.workers.base import Launcher, Placement
from kdflow_core.workers.group import save_ranks
from kdflow_core.workers.local import LocalLauncher
from kdflow_core.workers.ray_launcher import RayLauncher
from storage.artifact import ArtifactRef
from storage.lease import Pulse, exclusive, lease_name
from tasks.execution.progress import ProgressLog, Show
from tasks.execution.termination import saving_first
from tasks.presentation.gauges import Gauges
from tasks.stages.catalogue import CATALOGUE, devices_of, engines_of
from tasks.stages.checkpoint_places import fetch_checkpoints
from tasks.stages.identity import StageIdentity, StageSpec, find, open_store, run_of_teacher

ENDING_S = 300.0  # more than ranks that stand still take to be ended

# What most stages load, and takes its time; not what reads the environment of its stage.
PRELOAD = [
    *sorted({stage.job.partition(":")[0] for stage in CATALOGUE.values()}),
    "tasks.jobs.stage_host",
    "pandas",  # pyarrow loads it when it makes its first array
    "torch.utils.tensorboard",
]
SGLANG = ["kdflow_core.sglang_runtime.engine", "kdflow_core.sglang_runtime.in_process"]

Logger = logging.Logger | logging.LoggerAdapter[Any]


class Listener:
    """Logs what a group of ranks reports. See `Events`."""

    def __init__(
        self,
        logger: Logger,
        name: str,
        pulse: Callable[[], None],
        show: Show = lambda *_: None,
        gauges: Gauges | None = None,
    ) -> None:
        self._logger = logger
        self._gauges = gauges
        self._name = name
        self._pulse = pulse
        self._progress = ProgressLog(logger, show)

    def event(self, event: dict[str, Any]) -> None:
        """Progress, messages and figures."""
        self._progress.event(event)
        if self._gauges is not None:
            self._gauges.event(event)

    def line(self, rank: int, text: str) -> None:
        """What a library has printed."""
        self._logger.warning("[%s rank %d] %s", self._name, rank, printable(public(text)))

    def beat(self) -> None:
        """The lease goes on."""
        self._pulse()


def launcher_of(spec: StageSpec) -> Launcher:
    """What starts the ranks of a run."""
    if isinstance(spec.run.workers, RayWorkers):
        return RayLauncher(spec.run.workers)
    return LocalLauncher(_preload(spec.run, [spec.identity]))


def warm_up(run: RunConfig, stages: Iterable[StageIdentity] = ()) -> None:
    """Have what ranks are forked from begin to load, where they are, and do not wait: what most
    ranks need, and those of the `stages` that are still to be run.
    """
    if isinstance(run.workers, RayWorkers):
        return  # nothing is forked there
    lacking = [identity for identity in stages if find(run, identity) is None]
    launcher = LocalLauncher(_preload(run, lacking))
    launcher.warm(Placement(name="stages"))


def _preload(run: RunConfig, stages: Iterable[StageIdentity]) -> list[str]:
    for identity in stages:
        engines = engines_of(run_of_teacher(run, identity.teacher), identity.stage)
        if any(engine.type == "sglang" for engine in engines.values()):
            return PRELOAD + SGLANG
    return PRELOAD


def ask_rank(name: str, job: str, spec: str, method: str, **arguments: Any) -> Any:
    """What a rank that serves no stage says to one call. Raises WorkerError."""
    logger = logging.getLogger("kdflow")
    listener = Listener(logger, name, lambda: None)
    placement = Placement(name=name)
    try:
        with LocalLauncher(PRELOAD).start(job, spec, placement, listener) as group:
            return group.call(method, **arguments).replies()[0]
    except WorkerError as error:
        tell_failure(logger, error)
        raise


def launch_stage(spec: StageSpec, logger: Logger, show: Show = lambda *_: None) -> ArtifactRef:
    """The stage's artifact, computed when it is not there or not intact. `show` is told how far it
    is.

    Raises WorkerError when a rank fails; what it had finished stays for the next attempt.
    """
    identity = spec.identity
    logger.info("stage %s, artifact %s/%s", identity.stage, identity.kind, identity.digest)

    ref = find(spec.run, identity)  # needs no lease: the store may be read-only
    if ref is not None:
        logger.info("the artifact is there and intact")
        return ref
    with stage_lease(spec, logger) as pulse:
        ref = find(spec.run, identity)
        if ref is not None:
            logger.info("the artifact is there by now")
            return ref
        open_store(spec.run).retract(identity.kind, identity.digest)
        fetch_checkpoints(spec, logger.info)
        _run_ranks(spec, logger, pulse, show)
        ref = find(spec.run, identity)
    if ref is None:
        raise WorkerError(f"stage {identity.stage} ended without its artifact")
    return ref


def launch_share(spec: StageSpec, logger: Logger) -> None:
    """Do one portion of a stage's work; `launch_stage` then finds it done. Raises WorkerError."""
    portion = spec.portion
    assert portion is not None
    logger.info("stage %s, portion %d of %d", spec.identity.stage, portion.number + 1, portion.of)
    with stage_lease(spec, logger) as pulse:
        _run_ranks(spec, logger, pulse, lambda *_: None)


def stage_lease(spec: StageSpec, logger: Logger) -> AbstractContextManager[Pulse]:
    """The lease of a stage, or of a portion of it; without progress it runs out after its ranks."""
    name = lease_name(spec.identity.kind, spec.identity.digest)
    if spec.portion is not None:
        name += f"-portion-{spec.portion.number}-of-{spec.portion.of}"

    def tell(holder: str) -> None:
        logger.info("%s is computing this artifact; waiting for it", holder)

    idle_s = spec.run.stall_limit_s + ENDING_S
    return exclusive(open_store(spec.run), name, tell, idle_s=idle_s)


def saving_ranks() -> AbstractContextManager[None]:
    """Within, where ranks of this process are waited for, a SIGTERM first has them save what is
    done.
    """
    return saving_first(save_ranks)


def tell_failure(logger: Logger, error: WorkerError) -> None:
    """Log the details behind an error's message."""
    if error.details:
        logger.error("%s; its traceback or last output:\n%s", error, error.details)


def _run_ranks(spec: StageSpec, logger: Logger, pulse: Pulse, show: Show) -> None:
    stage = CATALOGUE[spec.identity.stage]
    placement = Placement(
        name=f"stage {spec.identity.name}",
        num_ranks=stage.ranks(spec.run),
        devices=devices_of(spec.run, stage.name),
        env=stage.env,
    )
    try:
        with (
            launcher_of(spec).start(
                "tasks.jobs.stage_host:StageHost",
                spec.model_dump_json(),
                placement,
                Listener(
                    logger,
                    stage.name,
                    pulse.touch,
                    show,
                    Gauges(spec.run, spec.identity.name, logger.warning),
                ),
                stall_s=spec.run.stall_limit_s,
            ) as group,
            saving_ranks(),
        ):
            group.call("work").replies()
    except WorkerError as error:
        tell_failure(logger, error)
        raise
