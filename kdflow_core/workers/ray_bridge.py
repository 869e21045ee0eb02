"""`python -m kdflow_core.workers.ray_bridge`: a launcher's side of a Ray cluster, in a process of
its own. See `ray_orders` for what goes in and out.

Ray takes a process for its own: it sets handlers of signals, ends the process when its node is
lost, and holds it in calls that nothing interrupts. Here, all of that ends one group of ranks. The
end of standard input, which is also the launcher's, ends it, too.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from kdflow_core.workers.base import RankContext
from kdflow_core.workers.ray_orders import (
    Cluster,
    FromBridge,
    Group,
    Node,
    Order,
    Seat,
    ToRank,
    bundle_of,
    room_for,
)
from kdflow_core.workers.ray_relay import BEAT_S, Relay, look_around, unlike_here

ANSWER_S = 10.0  # what a node that is there takes for an answer at most
LOOK_S = 120.0  # torch is loaded for it
# Ray kills the children of a worker that ends; a rank that is killed leaves what it has started.
OWN_CHILDREN = {"RAY_kill_child_processes_on_worker_exit": "false"}
OUTPUT = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
_writing = threading.Lock()


class BridgeError(Exception):
    """What the launcher is told, as it is."""


def tell(**message: Any) -> None:
    """Tell the launcher something."""
    line = FromBridge(**message).model_dump_json(exclude_defaults=True) + "\n"
    with _writing:
        OUTPUT.write(line.encode())


def connect(cluster: Cluster) -> None:
    """Join the cluster as a driver. Raises BridgeError."""
    chosen: dict[str, Any] = {"address": cluster.address}
    host = cluster.address.partition(":")[0]
    if host.startswith("127."):  # several nodes on one machine; this one is the head's
        chosen["_node_ip_address"] = host
    try:
        ray.init(**chosen, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise BridgeError(f"{type(error).__name__}: {error}") from error


def alive() -> list[dict[str, Any]]:
    """The nodes that are there."""
    return [node for node in ray.nodes() if node["Alive"]]


def look(cluster: Cluster) -> tuple[Node, ...]:
    """What each node is. Raises BridgeError for one that does not answer."""
    connect(cluster)
    asked = ray.remote(num_cpus=0, max_retries=0)(look_around)
    nodes = alive()
    answers = [
        asked.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(cluster.folders)
        for node in nodes
    ]
    found = []
    for node, answer in zip(nodes, answers, strict=True):
        address = node["NodeManagerAddress"]
        try:
            told = ray.get(answer, timeout=LOOK_S)
        except (RayError, GetTimeoutError) as error:
            raise BridgeError(f"node {address} does not answer: {_first_line(error)}") from error
        found.append(Node(address=address, resources=node["Resources"], **told))
    return tuple(found)


class Ranks:
    """A group of ranks on the cluster: one in each bundle of a placement group, or in seats that
    ranks of another group have, whose resources they share.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        connect(group.cluster)
        resources = [node["Resources"] for node in alive()]
        self._bundle = bundle_of(group.cpus, group.gpus, group.placement.devices, resources)
        self._placed: PlacementGroup | None = None
        self._relays: list[Any] = []
        self.contexts: tuple[RankContext, ...] = ()

    def _place(self) -> PlacementGroup:
        """Room for all ranks. Raises BridgeError, which says what there is."""
        bundle, count, nodes = self._bundle, self._group.placement.num_ranks, alive()
        fitting = room_for(bundle, [node["Resources"] for node in nodes])
        if fitting < count:
            raise BridgeError(
                f"{count} ranks of {_told(bundle)} each do not fit onto this cluster, which has "
                "room for "
                + f"{fitting} when it is empty ("
                + "; ".join(f"{n['NodeManagerAddress']}: {_told(n['Resources'])}" for n in nodes)
                + ")"
            )
        placed = placement_group([bundle] * count, strategy=self._group.strategy.upper())
        try:
            ray.get(placed.ready(), timeout=self._group.start_timeout_s)
        except GetTimeoutError as error:
            remove_placement_group(placed)
            raise BridgeError(
                f"no room for {count} ranks of {_told(bundle)} each within "
                f"{self._group.start_timeout_s:g} s: others use the cluster; free are "
                f"{_told(ray.available_resources())}. Raise workers.start_timeout_s, or wait"
            ) from error
        return placed

    def _in_bundles(self) -> list[str]:
        """A relay in each bundle, those of one node together; their addresses."""
        self._placed = self._place()
        node_of: dict[int, str] = placement_group_table(self._placed)["bundles_to_node_id"]
        nodes = list(dict.fromkeys(node_of[bundle] for bundle in sorted(node_of)))
        bundles = sorted(node_of, key=lambda bundle: (nodes.index(node_of[bundle]), bundle))
        address = {n["NodeID"]: n["NodeManagerAddress"] for n in alive()}
        for bundle in bundles:
            where = PlacementGroupSchedulingStrategy(
                self._placed, placement_group_bundle_index=bundle
            )
            self._relays.append(self._relay(where, self._bundle))
        return [address[node_of[bundle]] for bundle in bundles]

    def _in_seats(self, seats: Sequence[Seat]) -> list[str]:
        """A relay in each of the first seats, which are others' already; their addresses."""
        nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in alive()}
        for seat in seats:
            if seat.node not in nodes:
                raise BridgeError(f"node {seat.node} is gone")
            where = NodeAffinitySchedulingStrategy(nodes[seat.node], soft=False)
            self._relays.append(self._relay(where, {"CPU": 0}))
        return [seat.node for seat in seats]

    def start(self) -> None:
        """Start them. Those of one node stand together. Raises BridgeError."""
        group, ranks = self._group, self._group.placement.num_ranks
        addresses = self._in_seats(group.seats) if group.seats else self._in_bundles()
        nodes = list(dict.fromkeys(addresses))
        places = self._all("place", [(own,) for own in addresses])
        seats = group.seats or tuple(
            Seat(node=own, devices=place["devices"])
            for own, place in zip(addresses, places, strict=True)
        )
        for own, place in zip(addresses, places, strict=True):
            if unlike := unlike_here(own, place["versions"]):
                raise BridgeError(unlike)
        meeting = f"tcp://{addresses[0]}:{places[0]['port']}"
        self.contexts = tuple(
            RankContext(
                rank=number,
                local_rank=addresses[:number].count(own),
                node=nodes.index(own),
                num_ranks=ranks,
                rendezvous=meeting,
                address=own,
                sees_own_devices=True,
            )
            for number, own in enumerate(addresses)
        )
        self._all(
            "start",
            [
                (
                    group.job,
                    k,
                    group.placement,
                    group.folder,
                    group.given,
                    seat,
                    addresses.count(seat.node),
                )
                for k, seat in enumerate(seats)
            ],
        )
        tell(placed=self.contexts, seats=seats)  # before anything that ranks print
        for number in range(ranks):
            threading.Thread(target=self._read, args=(number,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def _relay(
        self,
        where: PlacementGroupSchedulingStrategy | NodeAffinitySchedulingStrategy,
        takes: Mapping[str, int],
    ) -> Any:
        kind = ray.remote(
            max_restarts=0, max_task_retries=0, concurrency_groups={"talk": 1, "ask": 1}
        )(Relay)
        return kind.options(
            num_cpus=takes["CPU"],
            num_gpus=takes.get("GPU", 0),
            runtime_env={"env_vars": OWN_CHILDREN},
            scheduling_strategy=where,
        ).remote()

    def _all(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        calls = [
            getattr(relay, method).remote(*own)
            for relay, own in zip(self._relays, arguments, strict=True)
        ]
        try:
            found: list[Any] = ray.get(calls, timeout=self._group.start_timeout_s)
        except (RayError, GetTimeoutError) as error:
            raise BridgeError(f"a rank did not start: {_first_line(error)}") from error
        return found

    def _read(self, number: int) -> None:
        try:
            output = self._relays[number].output.options(num_returns="streaming").remote()
            for item in output:
                told = ray.get(item)
                if isinstance(told, str):
                    tell(rank=number, line=told)
                else:
                    tell(rank=number, code=told)
                    return
        except RayError as error:
            tell(rank=number, lost=f"{type(error).__name__}: {_first_line(error)}")
            return
        tell(rank=number, lost="its output ended")

    def _beat(self) -> None:
        while True:
            for relay in self._relays:
                with contextlib.suppress(RayError):
                    relay.beat.options(concurrency_group="ask").remote()
            time.sleep(BEAT_S)

    def take(self, message: ToRank) -> None:
        """Pass something on to a rank."""
        relay = self._relays[message.rank]
        with contextlib.suppress(RayError):  # it is lost, which its reader has told
            if message.line is not None:
                relay.send.options(concurrency_group="talk").remote(message.line)
            if message.signal is not None:
                relay.signal.options(concurrency_group="talk").remote(message.signal)
        if message.ask:
            threading.Thread(target=self._ask, args=(message.rank,), daemon=True).start()

    def _ask(self, number: int) -> None:
        still: str | None = "was last heard of"
        with contextlib.suppress(RayError, GetTimeoutError):
            call = self._relays[number].stands_still.options(concurrency_group="ask").remote()
            still = ray.get(call, timeout=ANSWER_S)
        tell(rank=number, answered=True, still=still)

    def end(self) -> None:
        """End all relays, and with them ranks that are left; give the room back."""
        for relay in self._relays:
            with contextlib.suppress(RayError):
                ray.kill(relay)
        if self._placed is not None:
            remove_placement_group(self._placed)


def _told(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def main() -> int:
    """Do what the first line says. The exit code."""
    os.dup2(sys.stderr.fileno(), 1)  # what Ray prints is nobody's message
    requests = iter(sys.stdin)
    order = Order.model_validate_json(next(requests))
    try:
        if order.look is not None:
            tell(nodes=look(order.look))
            return 0
        assert order.group is not None
        ranks = Ranks(order.group)
        try:
            ranks.start()
            for line in requests:
                ranks.take(ToRank.model_validate_json(line))
        finally:
            ranks.end()
    except BridgeError as error:
        tell(error=str(error))
        return 1
    return 0


def _leave(code: int) -> None:
    """Out of the cluster, which takes what is left of ours with it."""
    ray.shutdown()
    os._exit(code)


if __name__ == "__main__":
    _leave(main())
