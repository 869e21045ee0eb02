"""Checkpoints of weights and optimizer with torch.distributed.checkpoint.

A checkpoint is complete when its folder has its final name: it is written under a temporary name
and renamed by rank 0 after all ranks are done. The rest of the training state (data order, learning
rate, random numbers) is a function of the step.
"""

import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

NAME = re.compile(r"^step-(\d{8})$")


def completed_steps(folder: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(m.group(1)) for p in folder.iterdir() if (m := NAME.match(p.name)))


class CheckpointWriter:
    """Writes checkpoints behind the caller's back, one at a time, and keeps the newest `keep`.

    What is saved is copied to host memory first, so that training may go on. Every rank makes one
    and calls its methods together with the others.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        # Of its own, as the writing ranks talk while the training ones do.
        self._group = dist.new_group(backend="gloo")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Save what is there after `step` optimizer steps. It counts once it is whole on the disk;
        `wait` waits for that. Raises what has gone wrong with the one before.
        """
        self.wait()
        temporary = self._folder / f"step-{step:08d}.tmp"
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        weights, optimizer_state = get_state_dict(module, optimizer)
        written = async_save(
            {"model": weights, "optimizer": optimizer_state},
            checkpoint_id=str(temporary),
            process_group=self._group,
        )
        self._pending = self._pool.submit(self._finish, written, temporary, step)

    def _finish(self, written: Any, temporary: Path, step: int) -> None:
        """Rank 0's is done when all ranks have written."""
        written.result()
        if dist.get_rank() == 0:
            temporary.rename(self._folder / f"step-{step:08d}")
            for old in completed_steps(self._folder)[: -self._keep]:
                shutil.rmtree(self._folder / f"step-{old:08d}")

    def wait(self) -> None:
        """Until what was saved is on the disk."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


def load_newest(folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest complete checkpoint, if any; the number of steps done (0 without one)."""
    steps = completed_steps(folder)
    if not steps:
        return 0
    weights, optimizer_state = get_state_dict(module, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": optimizer_state}
    load(state, checkpoint_id=str(folder / f"step-{steps[-1]:08d}"))
    set_state_dict(
        module,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return steps[-1]
