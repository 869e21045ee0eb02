"""Ranks on the machines of a Ray cluster.

A bridge (`ray_bridge`), a process of this machine, joins the cluster; on the nodes, relays
(`ray_relay`) start the ranks. Whatever dies on the way ends the whole group: a rank loses its
launcher with its relay, a relay with the bridge, and the bridge with this process.
"""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec

from configs.schema.workers import RayWorkers
from kdflow_core.errors import WorkerError
from kdflow_core.workers.base import STALL_S, Events, Launcher, Placement, Start
from kdflow_core.workers.group import RankGroup, RankProcess
from kdflow_core.workers.ray_orders import (
    Cluster,
    FromBridge,
    Group,
    Node,
    Order,
    Seat,
    ToRank,
    shared_seats,
)

# Variables of this process that its ranks get: where things are, and how libraries behave.
FORWARDED = (
    "AWS_", "FSSPEC_", "GLOO_", "GOOGLE_", "HF_", "KDFLOW_", "MALLOC_", "NCCL_", "OMP_",
    "PYTHONPATH", "SGLANG_", "TORCH_", "TRANSFORMERS_",
)  # fmt: skip
LEAVING_S = 15.0  # what a bridge takes to leave the cluster
LOOK_S = 180.0
PROBE_S = 10.0
START_SLACK_S = 60.0
LAST_BYTES = 2000


class RayProcess:
    """A rank on a node of the cluster, by way of the bridge. See `RankProcess`."""

    def __init__(self, number: int, node: str, send: Callable[[ToRank], None]) -> None:
        self.where = f" on node {node}"
        self.lost = ""
        self._number = number
        self._send = send
        self._printed: queue.Queue[str | None] = queue.Queue()
        self._code: int | None = None
        self._ended = threading.Event()
        self._answers: queue.Queue[str | None] = queue.Queue()

    def take(self, message: FromBridge) -> None:
        """What the bridge tells of this rank."""
        if message.line is not None:
            self._printed.put(message.line)
        elif message.answered:
            self._answers.put(message.still)
        elif message.code is not None or message.lost is not None:
            self.end(message.code, message.lost or "")

    def end(self, code: int | None, lost: str) -> None:
        """It has ended, with an exit code, or is `lost`. Only the first time counts."""
        if self._ended.is_set():
            return
        self._code, self.lost = -int(signal.SIGKILL) if code is None else code, lost
        self._ended.set()
        self._printed.put(None)

    def send(self, line: str) -> None:
        """See `RankProcess`."""
        self._send(ToRank(rank=self._number, line=line))

    def lines(self) -> Iterator[str]:
        """See `RankProcess`."""
        while (line := self._printed.get()) is not None:
            yield line

    def poll(self) -> int | None:
        """See `RankProcess`."""
        return self._code if self._ended.is_set() else None

    def wait(self, timeout: float | None = None) -> int:
        """See `RankProcess`."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"rank {self._number}", timeout or 0.0)
        assert self._code is not None
        return self._code

    def signal(self, number: signal.Signals) -> None:
        """See `RankProcess`."""
        self._send(ToRank(rank=self._number, signal=number))
        if number == signal.SIGKILL and not self._ended.wait(LEAVING_S):
            self.end(None, "its node does not answer")

    def stands_still(self) -> str | None:
        """See `RankProcess`."""
        self._send(ToRank(rank=self._number, ask=True))
        try:
            return self._answers.get(timeout=LEAVING_S)
        except queue.Empty:
            return "was last heard of"

    def close(self) -> None:
        """See `RankProcess`; the bridge ends its relay."""
        self.end(None, "it was let go of")


class _Bridge:
    """The bridge's process. Raises WorkerError when the first thing it tells is an error."""

    def __init__(self, order: Order, timeout_s: float) -> None:
        self._errors = os.memfd_create("kdflow-ray-bridge")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kdflow_core.workers.ray_bridge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self.processes: list[RayProcess] = []
        self._first: queue.Queue[FromBridge | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._write(order.model_dump_json())
        try:
            self.first = self._await(timeout_s)
        except BaseException:
            self.close()
            raise

    def _await(self, timeout_s: float) -> FromBridge:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:  # in turns, so that a signal is not held up
            with contextlib.suppress(queue.Empty):
                first = self._first.get(timeout=1.0)
                if first is None:
                    raise WorkerError(
                        "the connection to the Ray cluster ended at once",
                        details=self._last_words(),
                    )
                if first.error is not None:
                    raise WorkerError(f"Ray: {first.error}", expected=True)
                return first
        raise WorkerError(
            f"the Ray cluster did not answer within {timeout_s:g} s; `ray status` says whether it "
            "is well",
            details=self._last_words(),
        )

    def _read(self) -> None:
        assert self._process.stdout is not None
        begun = False
        for line in self._process.stdout:
            message = FromBridge.model_validate_json(line)
            if not begun:
                begun = True
                for context in message.placed or ():
                    self.processes.append(RayProcess(context.rank, context.address, self.send))
                self._first.put(message)
            else:
                self.processes[message.rank].take(message)
        self._first.put(None)
        for process in self.processes:
            process.end(None, "the connection to the Ray cluster has ended")

    def send(self, message: ToRank) -> None:
        """Tell the bridge something for a rank."""
        self._write(message.model_dump_json(exclude_defaults=True))

    def _write(self, text: str) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended, which is read
            stdin.write(text + "\n")
            stdin.flush()

    def close(self) -> None:
        """Have it leave the cluster, and with it what is left of its ranks. May be called twice."""
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(LEAVING_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        if self._errors >= 0:
            os.close(self._errors)
            self._errors = -1

    def _last_words(self) -> str:
        size = os.fstat(self._errors).st_size
        return os.pread(self._errors, LAST_BYTES, max(0, size - LAST_BYTES)).decode(
            errors="replace"
        )


class RayLauncher:
    """Starts ranks on a cluster. Raises WorkerError where there is none, or no room."""

    one_machine = False

    def __init__(self, config: RayWorkers) -> None:
        self._config = config
        self._seats: dict[str, tuple[Seat, ...]] = {}  # of groups that were started

    def start(
        self,
        job: str,
        spec: str,
        placement: Placement,
        events: Events,
        *,
        stall_s: float = STALL_S,
    ) -> RankGroup:
        """See `Launcher`."""
        config = self._config
        order = Group(
            cluster=Cluster(address=config.address),
            job=job,
            placement=replace(placement, env=dict(placement.env)),
            folder=os.getcwd(),
            given=_forwarded() | config.env,
            strategy=config.strategy,
            cpus=config.cpus_per_rank,
            gpus=config.gpus_per_rank,
            start_timeout_s=config.start_timeout_s,
            seats=self._beside(placement),
        )
        _require_access(config)
        bridge = _Bridge(Order(group=order), 2 * config.start_timeout_s + START_SLACK_S)
        group = RankGroup(placement.name, events, stall_s=stall_s, release=bridge.close)
        try:
            assert bridge.first.placed is not None
            self._seats[placement.name] = bridge.first.seats
            for context, process in zip(bridge.first.placed, bridge.processes, strict=True):
                group.add(process, Start(context=context, job=job, spec=spec))
        except BaseException:
            group.end()
            raise
        return group

    def _beside(self, placement: Placement) -> tuple[Seat, ...]:
        """The seats that ranks share with those of another group. Raises WorkerError."""
        if placement.beside is None:
            return ()
        seats = shared_seats(self._seats[placement.beside], placement.devices)
        if len(seats) < placement.num_ranks:
            raise WorkerError(
                f"{placement.num_ranks} ranks of {placement.name}, of {placement.devices} devices "
                f"of one node each, do not fit onto those of {placement.beside}, which have room "
                f"for {len(seats)}",
                expected=True,
            )
        return tuple(seats[: placement.num_ranks])


def nodes_of(config: RayWorkers, folders: tuple[str, ...] = ()) -> tuple[Node, ...]:
    """The nodes of a cluster, and which of the folders each sees. Raises WorkerError."""
    _require_access(config)
    bridge = _Bridge(Order(look=Cluster(address=config.address, folders=folders)), LOOK_S)
    bridge.close()
    assert bridge.first.nodes is not None
    return bridge.first.nodes


def _require_access(config: RayWorkers) -> None:
    """What can be known without a cluster. Raises WorkerError."""
    if find_spec("ray") is None:
        raise WorkerError(
            "workers.type=ray needs Ray here and on every node: pip install -e '.[ray]'",
            expected=True,
        )
    if config.require_token and os.environ.get("RAY_AUTH_MODE") != "token":
        raise WorkerError(
            "workers.type=ray: RAY_AUTH_MODE=token is not set, and without it anyone who reaches "
            "the ports of a Ray cluster runs code on it. Set it on all nodes and here (with "
            "RAY_AUTH_TOKEN, the same everywhere), or workers.require_token=false where nobody "
            "else reaches them",
            expected=True,
        )
    host, _, port = config.address.partition(":")
    if port:
        try:
            socket.create_connection((host, int(port)), timeout=PROBE_S).close()
        except OSError as error:
            raise WorkerError(
                f"workers.address={config.address} is not reached ({error}); start the cluster "
                "there (ray start --head --port=...), or give the address that `ray status` shows",
                expected=True,
            ) from error


def _forwarded() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}


def _contract(launcher: RayLauncher, process: RayProcess) -> None:
    """Checked by mypy: what is here fits the contracts."""
    _launcher: Launcher = launcher
    _process: RankProcess = process
