"""Run one stage in worker processes, unless its artifact is there already."""

import logging
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from configs.printable import printable
from configs.secrets import public
from kdflow_core.errors import WorkerError
from kdflow_core.workers.local import run_ranks
from storage.artifact import ArtifactRef
from storage.lease import Pulse, exclusive, lease_name
from tasks.progress import ProgressLog
from tasks.stages import StageSpec, open_store

# By default glibc gives every large buffer back to the kernel, and the page faults of taking it
# again cost a good part of a training step on a CPU, where the loss takes chunks of logits.
KEEP_BUFFERS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(10**11),
    "MALLOC_TOP_PAD_": str(2**29),
}
# SGLang's processes warn of kernels that other hardware has.
QUIET = {"PYTHONWARNINGS": "ignore"}

ENDING_S = 300.0  # more than ranks that stand still take to be ended

Logger = logging.Logger | logging.LoggerAdapter[Any]


def launch_stage(spec: StageSpec, logger: Logger) -> ArtifactRef:
    """The stage's artifact, computed when it is not there or not intact.

    Raises WorkerError when a worker fails; what it had finished stays for the next attempt.
    """
    identity = spec.identity
    store = open_store(spec.run)
    logger.info("stage %s, artifact %s/%s", identity.stage, identity.kind, identity.digest)

    ref = store.find(identity.kind, identity.digest)  # needs no lease: the store may be read-only
    if ref is not None:
        logger.info("the artifact is there and intact")
        return ref
    with stage_lease(spec, logger) as pulse:
        ref = store.find(identity.kind, identity.digest)
        if ref is not None:
            logger.info("the artifact is there by now")
            return ref
        store.retract(identity.kind, identity.digest)
        _run_workers(spec, logger, pulse)
        ref = store.find(identity.kind, identity.digest)
    if ref is None:
        raise WorkerError(f"stage {identity.stage} ended without its artifact")
    return ref


def launch_share(spec: StageSpec, logger: Logger) -> None:
    """Do one share of a stage's work; `launch_stage` then finds it done. Raises WorkerError."""
    share = spec.share
    assert share is not None
    logger.info("stage %s, share %d of %d", spec.identity.stage, share.number + 1, share.of)
    with stage_lease(spec, logger) as pulse:
        _run_workers(spec, logger, pulse)


def stage_lease(spec: StageSpec, logger: Logger) -> AbstractContextManager[Pulse]:
    """The lease of a stage, or of a share of it; without progress it runs out after its ranks."""
    name = lease_name(spec.identity.kind, spec.identity.digest)
    if spec.share is not None:
        name += f"-share-{spec.share.number}-of-{spec.share.of}"

    def tell(holder: str) -> None:
        logger.info("%s is computing this artifact; waiting for it", holder)

    idle_s = spec.run.stall_limit_s + ENDING_S
    return exclusive(open_store(spec.run), name, tell, idle_s=idle_s)


def tell_line(logger: Logger, name: str, rank: int, text: str) -> None:
    """Pass on what a rank has printed."""
    logger.warning("[%s rank %d] %s", name, rank, printable(public(text)))


def _run_workers(spec: StageSpec, logger: Logger, pulse: Pulse) -> None:
    progress = ProgressLog(logger)
    stage = spec.identity.stage
    student, teacher = spec.run.student, spec.run.teacher
    ranks = {
        "train": student.num_ranks,
        "extract": teacher.num_ranks,
        "generate": spec.run.answering_ranks,
        "estimate": max(student.num_ranks, teacher.ranks_per_replica),
    }

    try:
        run_ranks(
            module="tasks.worker",
            request=spec.model_dump_json(),
            num_ranks=ranks.get(stage, 1),
            env={"train": KEEP_BUFFERS, "estimate": KEEP_BUFFERS, "generate": QUIET}.get(stage, {}),
            on_event=progress.event,
            on_line=partial(tell_line, logger, stage),
            name=f"stage {spec.identity.name}",
            stall_s=spec.run.stall_limit_s,
            on_beat=pulse.touch,
        )
    except WorkerError as error:
        if error.details:
            logger.error("%s; its traceback or last output:\n%s", error, error.details)  # noqa: TRY400
        raise
