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


class Seat(_Message):
    """Where a rank stands: a node's address, and its accelerators there as CUDA_VISIBLE_DEVICES
    has them, where Ray has set it.
    """

    node: str
    devices: str | None = None


class Group(_Message):
    """Ranks that are to be started on a cluster, in a working `folder` that all nodes have, `given`
    variables of the environment; in `seats` that others have, where there are any.
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
    seats: tuple[Seat, ...] = ()


def shared_seats(seats: Sequence[Seat], devices: int) -> list[Seat]:
    """Those for ranks that use so many of others' `seats` each, all of one node."""
    shared = []
    for node in dict.fromkeys(seat.node for seat in seats):
        own = [seat.devices for seat in seats if seat.node == node]
        for first in range(0, len(own) - devices + 1, devices):
            seen = [each for each in own[first : first + devices] if each is not None]
            shared.append(Seat(node=node, devices=",".join(seen) if seen else None))
    return shared


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


def nodes_for(
    bundle: Mapping[str, int],
    count: int,
    nodes: Sequence[Mapping[str, float]],
    strategy: Literal["pack", "spread"],
) -> int:
    """On how many nodes of these resources so many ranks come to stand, when they are empty; all of
    the nodes where there is no room for them.
    """
    rooms = sorted((room_for(bundle, [own]) for own in nodes), reverse=True)
    if strategy == "spread":
        return min(count, sum(room > 0 for room in rooms))
    return next((n for n in range(1, len(rooms)) if sum(rooms[:n]) >= count), len(rooms))


def lacks_room(
    wanted: Sequence[tuple[Mapping[str, int], int]], nodes: Sequence[Mapping[str, float]]
) -> bool:
    """Whether nodes of these resources, when they are empty, do not hold so many ranks of each of
    these bundles side by side.
    """
    free = [dict(own) for own in nodes]
    for bundle, count in sorted(wanted, key=lambda one: -one[0].get("GPU", 0)):  # the large first
        lacking = count
        for own in free:
            placed = min(lacking, room_for(bundle, [own]))
            lacking -= placed
            own.update({name: own[name] - placed * size for name, size in bundle.items() if placed})
        if lacking:
            return True
    return False


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
    """What a bridge tells: where the ranks are, with their seats, or the nodes; or what is wrong.
    Of a rank: a line that it prints, its exit code, how it was lost, or in answer to a question,
    why it stands still.
    """

    placed: tuple[RankContext, ...] | None = None
    seats: tuple[Seat, ...] = ()
    nodes: tuple[Node, ...] | None = None
    error: str | None = None
    rank: int = 0
    line: str | None = None
    code: int | None = None
    lost: str | None = None
    answered: bool = False
    still: str | None = None
