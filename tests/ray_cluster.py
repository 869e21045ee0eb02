"""A Ray cluster of two nodes on this machine: `python -m tests.ray_cluster`, as `running_cluster`
starts it. It ends with its standard input.
"""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from tests.processes import stage_ranks

HEAD, SECOND = "127.0.0.2", "127.0.0.3"  # Ray writes others of the loopback as network addresses
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}
STORE_BYTES = 80 * 2**20  # about the smallest that there is
READY_S = 120
ATTEMPTS = 3  # Ray waits 30 s for a node, which a machine with other work may not have ready


def main() -> None:
    """Two nodes, until the end of standard input."""
    from ray.cluster_utils import Cluster

    # Of GPUs, Ray goes by what it is told.
    size = {"num_cpus": 4, "num_gpus": 4, "object_store_memory": STORE_BYTES}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**size, "include_dashboard": False, "node_ip_address": HEAD},
    )
    second = cluster.add_node(**size, node_ip_address=SECOND)
    raylets = {
        name: node.all_processes["raylet"][0].process.pid
        for name, node in (("head", cluster.head_node), ("second", second))
    }
    sys.stdout.write(json.dumps({"address": cluster.address, "raylets": raylets}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()


class RayCluster:
    """The address of the head, and the processes that are a node each."""

    def __init__(self, address: str, raylets: dict[str, int]) -> None:
        self.address = address
        self.raylets = raylets

    def ranks(self) -> list[psutil.Process]:
        """The ranks of stages on both nodes, of which one may be gone."""
        alive = [pid for pid in self.raylets.values() if psutil.pid_exists(pid)]
        return [rank for pid in alive for rank in stage_ranks(psutil.Process(pid))]


@contextmanager
def running_cluster() -> Iterator[RayCluster]:
    """A cluster, and the environment in which it can be reached."""
    token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in ENVIRONMENT | token}
    os.environ.update(ENVIRONMENT | token)
    # The paths of its sockets are near the longest that there may be.
    with TemporaryDirectory(prefix="kr", dir="/tmp") as folder, ExitStack() as stack:
        try:
            for attempt in range(ATTEMPTS):
                if line := stack.enter_context(_started(Path(folder) / str(attempt))):
                    yield RayCluster(**json.loads(line))
                    return
            raise AssertionError("the cluster did not start")
        finally:
            stack.close()
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@contextmanager
def _started(folder: Path) -> Iterator[str]:
    """The line that its process tells of itself; none where Ray has not come up in its time."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ray_cluster"],
        env=os.environ | {"RAY_TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield next((line for line in process.stdout if line.startswith("{")), "")
    finally:
        process.stdin.close()
        process.wait(READY_S)
        process.stdout.close()


if __name__ == "__main__":
    main()
