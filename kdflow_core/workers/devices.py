"""What torch gives a rank: its device, and the process group of its group."""

import torch
import torch.distributed as dist

from kdflow_core.waiting import PATIENCE, UNWATCHED
from kdflow_core.workers.base import RankContext
from kdflow_core.workers.rank_side import is_launched


def device_of(context: RankContext) -> torch.device:
    """The rank's accelerator, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = context.local_rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def join_group(context: RankContext) -> None:
    """Meet the other ranks."""
    backend = "cpu:gloo,cuda:nccl" if device_of(context).type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=context.rendezvous,
        rank=context.rank,
        world_size=context.num_ranks,
        timeout=PATIENCE if is_launched() else UNWATCHED,
    )


def barrier() -> None:
    """Wait for all ranks; alone, there is nobody to wait for."""
    if dist.is_initialized():
        dist.barrier()
