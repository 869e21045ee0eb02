"""SGLang's parallel groups inside a process group that exists already.

SGLang takes the whole world for one copy of the model. Here the world may hold several, each on
consecutive ranks: the data-parallel ranks of an extraction, or the ranks that train the student.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from sglang.srt.distributed import bootstrap, parallel_state
from sglang.srt.eplb.expert_location import set_global_expert_location_metadata
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.runtime_context import get_parallel
from torch._C._distributed_c10d import HashStore

from kdflow_core.sglang_runtime.platform import leave_nccl_out


def join_world(device: torch.device) -> None:
    """Be a world of one, unless this process belongs to one already."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


@contextmanager
def replicas_in_this_world() -> Iterator[None]:
    """Within it, SGLang's bootstrap builds the groups of every replica, and leaves threads be."""
    with (
        mock.patch.object(bootstrap, "_init_parallel_groups", _init_groups),
        mock.patch.object(bootstrap, "_bind_threads_if_cpu", return_value=None),
    ):
        yield


def leave() -> None:
    """Take down what another model would stumble over; the world stays."""
    parallel_state.destroy_model_parallel()
    set_global_expert_location_metadata(None, allow_overwrite=True)


def _init_groups(*, backend: str, dist_init_method: str, server_args: Any, gpu_id: int) -> None:
    world, parallel = dist.get_world_size(), get_parallel()
    if backend == "gloo":
        leave_nccl_out()
    parallel_state.init_distributed_environment(
        backend=backend,
        world_size=world,
        rank=dist.get_rank(),
        local_rank=gpu_id,
        distributed_init_method=dist_init_method,
    )

    def group(name: str, ranks: list[list[int]]) -> Any:
        return parallel_state.init_model_parallel_group(
            ranks, gpu_id, backend, use_custom_allreduce=False, group_name=name
        )

    width, experts, stages = parallel.tp_size, parallel.moe_ep_size, parallel.pp_size
    slices = width // experts
    starts = range(0, world, width)
    tensor = group("tp", [list(range(s, s + width)) for s in starts])
    expert = group(
        "moe_ep",
        [list(range(s + i, s + width, slices)) for s in starts for i in range(slices)],
    )
    expert_slice = group("moe_tp", [list(range(s, s + slices)) for s in range(0, world, slices)])
    stage = group(
        "pp",
        [
            list(range(first + i, first + stages * width, width))
            for first in range(0, world, stages * width)
            for i in range(width)
        ],
    )
    alone = group("alone", [[rank] for rank in range(world)])
    groups = {
        "tp_group": tensor,
        "attn_tp_group": tensor,
        "moe_ep_group": expert,
        "moe_tp_group": expert_slice,
        "pp_group": stage,
        "moe_dp_group": alone,
        "attn_cp_group": alone,
    }
    for name, value in groups.items():
        setattr(parallel_state, f"_{name.removesuffix('_group').upper()}", value)
    parallel_state._SELF_PP = alone
    parallel.override_permanently(**groups)
    initialize_dp_attention(server_args=server_args)
