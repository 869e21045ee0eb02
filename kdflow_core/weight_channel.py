"""The bytes of weights on their way to processes of other machines, from host memory to host
memory, by Gloo: whoever receives them may be any engine, and on the sender's own GPU.

Dimensions: B bytes of a bucket.
"""

import torch
import torch.distributed as dist

from kdflow_core.waiting import PATIENCE
from kdflow_core.weight_buckets import Bucket

AT_ONCE = 2**30  # bytes


class WeightChannel:
    """One process that sends, rank 0, and those that receive. Made by all of them at the same time:
    they meet at the sender's address. Raises RuntimeError when one of them is gone.
    """

    def __init__(self, address: str, port: int, *, rank: int, ranks: int) -> None:
        # Of the process itself, whose default group is that of its own ranks alone. Torch's stubs
        # leave out of store and backend what this uses.
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, world_size=ranks, is_master=rank == 0, timeout=PATIENCE
        )
        self._group = dist.ProcessGroupGloo(store, rank, ranks, timeout=PATIENCE)

    def pass_on(self, bucket: Bucket) -> None:
        """The bytes of a bucket: rank 0's become those of the others, which have one as large."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        for part_B in torch.split(bucket.whole(), AT_ONCE):
            self._group.broadcast([part_B], options).wait()  # type: ignore[attr-defined]
