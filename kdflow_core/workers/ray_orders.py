"""What goes between a launcher and its bridge to a Ray cluster: JSON, a line each."""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from kdflow_core.workers.base import Placement, RankContext


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cluster(_Message):
    """A cluster that this machine is a node of: `host:port` of its head, or `auto`."""

    address: str
    folders: tuple[str, ...] = ()
    """What every node is asked for, where nothing is to be started."""


class Group(_Message):
    """Ranks that are to be started on a cluster, in a working `folder` that all nodes have, `given`
    variables of the environment.
    """

    cluster: Cluster
    job: str
    placement: Placement
    folder: str
    given: dict[str, str]
    strategy: Literal["pack", "spread"]
    cpus: int
    gpus: int | None
    start_timeout_s: float


def bundle_of(
    cpus: int, gpus: int | None, devices: int, nodes: Sequence[Mapping[str, float]]
) -> dict[str, int]:
    """What Ray sets aside for a rank that uses so many `devices`, by the names of the `nodes`'
    resources; `gpus` as `RayWorkers.gpus_per_rank`.
    """
    if gpus is None:
        gpus = devices if any(own.get("GPU") for own in nodes) else 0
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def room_for(bundle: Mapping[str, int], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many such ranks nodes of these resources hold when they are empty."""
    return sum(
        min(int(own.get(name, 0.0) // size) for name, size in bundle.items()) for own in nodes
    )


class Order(_Message):
    """The first thing that a bridge is told: to start ranks, or to look around."""

    group: Group | None = None
    look: Cluster | None = None


class ToRank(_Message):
    """What a rank gets: a line, or a signal; or a question whether it stands still."""

    rank: int
    line: str | None = None
    signal: int | None = None
    ask: bool = False


class Node(_Message):
    """What a node of a cluster is."""

    address: str
    host: str
    versions: dict[str, str]
    cores: int
    memory_gb: float
    gpus: tuple[str, ...]
    gpu_memory_gb: float
    """Of the smallest of them; 0 where there are none."""
    clock: float
    seen: tuple[str, ...]
    token: bool
    resources: dict[str, float]


class FromBridge(_Message):
    """What a bridge tells: where the ranks are, or the nodes; or what is wrong. Of a rank: a line
    that it prints, its exit code, how it was lost, or in answer to a question, why it stands still.
    """

    placed: tuple[RankContext, ...] | None = None
    nodes: tuple[Node, ...] | None = None
    error: str | None = None
    rank: int = 0
    line: str | None = None
    code: int | None = None
    lost: str | None = None
    answered: bool = False
    still: str | None = None
