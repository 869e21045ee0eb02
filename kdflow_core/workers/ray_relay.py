"""What runs on a node of a Ray cluster: an actor that starts one rank there, and passes on what
goes between it and the launcher. Nothing of Ray is needed for that.

The rank holds the reading end of a pipe of the actor: it ends with it. And the actor ends when it
has not heard from the launcher's side for `LOST_S` seconds, as where the machine is cut off.
"""

import contextlib
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from kdflow_core.workers.base import Placement
from kdflow_core.workers.local import LocalProcess, rank_command, rank_environment, start_process
from kdflow_core.workers.ports import free_port
from kdflow_core.workers.ray_orders import Seat

BEAT_S = 5.0
DEVICES = "CUDA_VISIBLE_DEVICES"
LOST_S = 120.0
VERSIONS = ("kdflow", "torch", "transformers", "ray")  # that must be the same on all nodes
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


class Relay:
    """A rank on this node, and where it is."""

    def __init__(self) -> None:
        self._process: LocalProcess | None = None
        self._heard = time.monotonic()
        threading.Thread(target=self._end_when_lost, daemon=True).start()

    def place(self, address: str) -> dict[str, Any]:
        """The versions here, a port at this node's address that nobody listens on, and what Ray
        lets the rank see of the accelerators.
        """
        devices = os.environ.get(DEVICES)
        return {"versions": versions(), "port": free_port(address), "devices": devices}

    def start(
        self,
        job: str,
        number: int,
        placement: Placement,
        folder: str,
        given: Mapping[str, str],
        seat: Seat,
        ranks: int,
    ) -> None:
        """Start the rank in a working folder, with variables that it is `given`, in its seat; it is
        one of so many on this node.
        """
        os.environ.update(given)
        if seat.devices is not None:
            os.environ[DEVICES] = seat.devices
        for name in INTERFACES:
            os.environ.setdefault(name, interface_of(seat.node))
        env = rank_environment(placement, ranks)
        self._process = start_process(rank_command(job, number, placement), env, folder)
        with contextlib.suppress(OSError):  # Ray's workers are nice, which a training is not
            os.setpriority(os.PRIO_PROCESS, self._process.pid, 0)

    def output(self) -> Iterator[str | int]:
        """The lines that the rank prints, and then its exit code."""
        assert self._process is not None
        yield from self._process.lines()
        yield self._process.wait()

    def send(self, line: str) -> None:
        """Give the rank a line."""
        assert self._process is not None
        self._process.send(line)

    def signal(self, number: int) -> None:
        """Send a signal to the rank and to what it has started."""
        if self._process is not None:
            self._process.signal(signal.Signals(number))

    def stands_still(self) -> str | None:
        """See `RankProcess`."""
        return None if self._process is None else self._process.stands_still()

    def beat(self) -> None:
        """The launcher's side is there."""
        self._heard = time.monotonic()

    def _end_when_lost(self) -> None:
        while time.monotonic() - self._heard < LOST_S:
            time.sleep(BEAT_S)
        self.signal(signal.SIGKILL)
        os._exit(1)


def versions() -> dict[str, str]:
    """Of Python and of what all nodes must have alike."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def unlike_here(address: str, found: Mapping[str, str]) -> str | None:
    """In what the versions of a node are others than here, as an error; None where they are not."""
    other = [
        f"{name} {found.get(name, 'missing')} (here {own})"
        for name, own in versions().items()
        if found.get(name) != own
    ]
    return f"node {address} has {', '.join(other)}; install the same there" if other else None


def interface_of(address: str) -> str:
    """The network interface that has an address of this machine."""
    if address.startswith("127."):
        return "lo"
    for name, addresses in psutil.net_if_addrs().items():
        if any(own.address == address for own in addresses):
            return str(name)
    raise OSError(f"no network interface of this machine has the address {address}")


def look_around(folders: Sequence[str]) -> dict[str, Any]:
    """What a node is: its versions, processors, memory and accelerators, its clock (seconds since
    1970), and which of the `folders` it sees.
    """
    return {
        "host": platform.node(),
        "versions": versions(),
        "cores": os.cpu_count() or 1,
        "memory_gb": psutil.virtual_memory().total / 1e9,
        **_gpus(),
        "clock": time.time(),
        "seen": [folder for folder in folders if Path(folder).exists()],
        "token": os.environ.get("RAY_AUTH_MODE") == "token",
    }


def _gpus() -> dict[str, Any]:
    import torch  # noqa: PLC0415 - seconds, that only this question is worth

    found = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    least = min((gpu.total_memory for gpu in found), default=0)
    return {"gpus": [gpu.name for gpu in found], "gpu_memory_gb": least / 1e9}
