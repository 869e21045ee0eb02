"""A real Prefect server for tests, with the repository's deployments."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from kdflow_core.workers.ports import free_port
from tests.processes import PATIENCE_S
from tests.readme import ROOT

PREFECT = str(Path(sys.executable).parent / "prefect")


class Server:
    """A Prefect server on loopback and the `prefect` command pointed at it."""

    def __init__(self, folder: Path) -> None:
        self._port = str(free_port())
        self.api = f"http://127.0.0.1:{self._port}/api"
        self.folder = folder
        self.env = os.environ | {
            "PREFECT_API_URL": self.api,
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "COLUMNS": "200",
        }
        self.processes = [self._serve()]

    def _serve(self) -> subprocess.Popen[bytes]:
        process = self.start("server", "start", "--host", "127.0.0.1", "--port", self._port)
        deadline = time.monotonic() + PATIENCE_S
        while not self.healthy():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        return process

    def restart(self, away_s: float) -> None:
        """End the server, and start it again when it has been away for a while."""
        self.processes[0].terminate()
        self.processes[0].wait(60)
        time.sleep(away_s)
        self.processes[0] = self._serve()

    def healthy(self) -> bool:
        try:
            return httpx.get(f"{self.api}/health").status_code == 200
        except httpx.TransportError:
            return False

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{arguments[0]}.log").open("wb")
        with log:
            return subprocess.Popen(
                [PREFECT, *arguments], env=self.env, cwd=self.folder, stdout=log, stderr=log
            )

    def command(self, *arguments: str, code: int = 0) -> str:
        result = subprocess.run(
            [PREFECT, *arguments],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
        logs = "".join(path.read_text() for path in self.folder.glob("worker.log"))
        assert result.returncode == code, result.stdout + result.stderr + logs
        return result.stdout

    def runs(self, **where: object) -> list[dict[str, object]]:
        return httpx.post(f"{self.api}/flow_runs/filter", json=where).json()

    def all_task_states(self, flow_run_id: object) -> list[tuple[str, str]]:
        """Stage and state of every task run, those of earlier attempts included."""
        where = {"flow_runs": {"id": {"any_": [flow_run_id]}}}
        found = httpx.post(f"{self.api}/task_runs/filter", json=where).json()
        return [(run["name"].rsplit("-", 1)[0], run["state_name"]) for run in found]

    def task_states(self, flow_run_id: object) -> dict[str, str]:
        return dict(self.all_task_states(flow_run_id))

    @contextmanager
    def worker(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker, for a while."""
        process = self.start(*command)
        try:
            yield process
        finally:
            process.terminate()
            _end(process)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:  # Prefect's worker does not always end when asked to
        process.kill()
        process.wait()


def start_server(folder: Path, migrated: Path) -> Server:
    """A server whose commands run in `folder`, which looks like a checkout; see the fixture
    `migrated`.
    """
    shutil.copytree(migrated, folder / "home")
    for name in ("prefect.yaml", "prefect.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("flows", "tasks", "kdflow_core", "storage", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return Server(folder)
