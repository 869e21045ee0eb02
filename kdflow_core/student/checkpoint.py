"""Checkpoints of weights and optimizer with torch.distributed.checkpoint.

A checkpoint is complete when its folder has its final name: it is written under a temporary name
and renamed by rank 0 after all ranks are done. The rest of the training state (data order, learning
rate, random numbers) is a function of the step.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

NAME = re.compile(r"^step-(\d{8})$")


def completed_steps(folder: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(m.group(1)) for p in folder.iterdir() if (m := NAME.match(p.name)))


def save_checkpoint(
    folder: Path,
    step: int,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    keep: int,
) -> None:
    """Save after `step` optimizer steps, then remove all but the newest `keep`."""
    temporary = folder / f"step-{step:08d}.tmp"
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    weights, optimizer_state = get_state_dict(module, optimizer)
    save({"model": weights, "optimizer": optimizer_state}, checkpoint_id=str(temporary))
    dist.barrier()
    if dist.get_rank() == 0:
        temporary.rename(folder / f"step-{step:08d}")
        for old in completed_steps(folder)[:-keep]:
            shutil.rmtree(folder / f"step-{old:08d}")
    dist.barrier()


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
