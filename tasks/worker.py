"""What a rank runs: a stage spec in, an artifact reference out, everything else as events.

Started by `kdflow_core.workers.local`. No Prefect here.
"""

import logging
import os
import sys
import time
import traceback

import datasets
import torch
import torch.distributed as dist
import transformers

from configs.secrets import public
from kdflow_core.errors import KdflowError
from kdflow_core.workers.rank_side import emit, made_progress, receive_requests
from tasks.stages import StageSpec
from tasks.wiring import STAGES
from tasks.wiring.stage_run import StageRun, default_device

PROGRESS_INTERVAL_S = 1.0
PARALLEL_STAGES = ("generate", "estimate", "extract", "train")


class EventReporter:
    """Progress and messages as events. Messages are rank 0's; progress is every rank's own share,
    which the receiver adds up.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._last = 0.0

    def progress(self, *, done: int, total: int, unit: str, detail: str = "") -> None:
        """See `Reporter`; at most one event a second, and the last one always."""
        made_progress()
        now = time.monotonic()
        if now - self._last < PROGRESS_INTERVAL_S and done != total:
            return
        self._last = now
        event = {"event": "progress", "rank": self._rank, "done": done, "total": total}
        emit(event | {"unit": unit, "detail": detail})

    def message(self, text: str) -> None:
        """See `Reporter`."""
        if self._rank == 0:
            emit({"event": "message", "text": public(text)})


def main() -> int:
    """Run one stage as one rank. Returns the exit code."""
    spec = StageSpec.model_validate_json(next(receive_requests()))
    rank = prepare_rank()
    try:
        if spec.identity.stage in PARALLEL_STAGES:
            join_ranks()
        ref = STAGES[spec.identity.stage](StageRun(spec, EventReporter(rank)))
    except Exception as error:  # noqa: BLE001 - the process boundary: all must reach the launcher
        report_error(error)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if ref is not None:
        emit({"event": "result", "ref": ref.model_dump(mode="json")})
    return 0


def prepare_rank() -> int:
    """Quiet libraries, and a share of the cores. Returns the rank."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.basicConfig(level=logging.WARNING)
    num_ranks = int(os.environ["KDFLOW_NUM_RANKS"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    return int(os.environ["KDFLOW_RANK"])


def join_ranks() -> None:
    """Meet the other ranks of the launcher."""
    backend = "cpu:gloo,cuda:nccl" if default_device().type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"file://{os.environ['KDFLOW_RENDEZVOUS']}",
        rank=int(os.environ["KDFLOW_RANK"]),
        world_size=int(os.environ["KDFLOW_NUM_RANKS"]),
    )


def report_error(error: Exception) -> None:
    """Tell the launcher what went wrong, and whether the message alone is for the user."""
    text = public("".join(traceback.format_exception(error)))
    message, expected = public(str(error)), isinstance(error, KdflowError) and error.expected
    if not expected and "No space left on device" in text:
        message, expected = (
            "the disk is full; what is finished stays: make room, or point storage.root and "
            "storage.scratch to a larger disk, and run again",
            True,
        )
    elif isinstance(error, torch.OutOfMemoryError | MemoryError):
        message, expected = (
            f"out of memory: {error}. Lower student.micro_batch_tokens, teacher.tokens_per_batch "
            "or loss.logits_memory_mb, or set student.activation_checkpointing=true",
            True,
        )
    elif not expected:
        message = f"{type(error).__name__}: {message}"
    emit({"event": "error", "message": message, "expected": expected, "traceback": text})


def leave(code: int) -> None:
    """End this process at once: at a usual exit, threads of native libraries abort some."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
