"""A real server and a real worker run the deployment, as the README says."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import free_port
from tests.readme import commands

pytestmark = [pytest.mark.prefect, pytest.mark.ranks]

ROOT = Path(__file__).parents[2]
PREFECT = str(Path(sys.executable).parent / "prefect")


class Server:
    """A Prefect server on loopback and the `prefect` command pointed at it."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.api = f"http://127.0.0.1:{port}/api"
        self.folder = folder
        self.env = os.environ | {
            "PREFECT_API_URL": self.api,
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "COLUMNS": "200",
        }
        self.processes = [self.start("server", "start", "--host", "127.0.0.1", "--port", str(port))]
        deadline = time.monotonic() + 180
        while not self.healthy():
            assert self.processes[0].poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)

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

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:  # Prefect's worker does not always end when asked to
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("prefect.yaml", "prefect.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("flows", "tasks", "kdflow_core", "storage", "configs"):
        (folder / name).symlink_to(ROOT / name)
    running = Server(folder)
    yield running
    running.stop()


def test_the_deployment_runs_to_completion(
    server: Server, make_recipe: Callable[..., Path]
) -> None:
    # The README's commands, but for the port and the recipe.
    _, pool, deploy, start_worker, run_it = (
        w[1:] for w in commands("As a service") if w[0] == "prefect"
    )
    server.command(*pool)
    deployed = server.command(*deploy)
    assert "kd/offpolicy" in deployed
    assert "kd/nightly" in deployed
    server.processes.append(server.start(*start_worker))

    # The cron schedule really creates runs.
    deadline = time.monotonic() + 120
    scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    while not any("nightly" in str(run["tags"]) for run in server.runs(**scheduled)):
        assert time.monotonic() < deadline, "the nightly schedule created no run"
        time.sleep(1)

    run_it = [w.replace("recipe=quickstart", f"recipe={make_recipe()}") for w in run_it]
    server.command(*run_it)
    completed = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    (first,) = server.runs(**completed)
    assert set(server.task_states(first["id"]).values()) == {"Completed"}
    artifacts = httpx.post(f"{server.api}/artifacts/filter", json={}).json()
    tables = [a for a in artifacts if a["type"] == "table"]
    assert [a["key"] for a in tables] == ["tiny-evaluation"]
    assert "student after" in str(tables[0]["data"])

    # The same again is served from cache, and says so in the UI.
    server.command(*run_it)
    second = next(r for r in server.runs(**completed) if r["id"] != first["id"])
    assert server.task_states(second["id"]) == dict.fromkeys(
        ("tokenize", "extract", "train", "evaluate", "report"), "Cached"
    )

    # A wrong parameter fails with its path and remedy, and exit code 1.
    bad = server.command(
        "deployment", "run", "kd/offpolicy", "--param", "recipe=quickstrat", "--watch", code=1
    )
    assert "Failed" in bad
    failed = server.runs(flow_runs={"state": {"type": {"any_": ["FAILED"]}}})
    assert re.search("did you mean 'quickstart'", str(failed[0]["state"]))


def test_a_failed_run_is_retried(server: Server, make_recipe: Callable[..., Path]) -> None:
    """Training fails; the retry serves what was finished from cache. With the worker from above."""
    recipe = ("--param", f"recipe={make_recipe(lr=1e30)}")
    server.command("deployment", "run", "kd/offpolicy", *recipe, "--watch", code=1)
    failed = server.runs(flow_runs={"state": {"type": {"any_": ["FAILED"]}}})
    run = next(r for r in failed if "not both finite" in str(r["state"]))
    server.command("flow-run", "retry", str(run["name"]))
    deadline = time.monotonic() + 120
    while True:
        (now,) = server.runs(flow_runs={"id": {"any_": [run["id"]]}})
        if now["run_count"] == 2 and now["state_type"] == "FAILED":
            break
        assert time.monotonic() < deadline, now["state"]
        time.sleep(0.5)
    states = server.all_task_states(run["id"])
    for stage in ("tokenize", "extract"):
        assert states.count((stage, "Completed")) == 1, (
            states
        )  # computed once, by the first attempt
        assert {state for name, state in states if name == stage} <= {"Completed", "Cached"}
    assert ("train", "Failed") in states


def test_a_cancelled_run_leaves_no_process(
    server: Server, make_recipe: Callable[..., Path]
) -> None:
    """Runs after the test above, with its worker."""
    recipe = ("--param", f"recipe={make_recipe(num_ranks=2, max_steps=1_000_000)}")
    server.command("deployment", "run", "kd/offpolicy", *recipe)
    worker = psutil.Process(server.processes[-1].pid)
    ranks: list[psutil.Process] = []
    deadline = time.monotonic() + 180
    while len(ranks) < 2:
        assert time.monotonic() < deadline, "training did not start"
        time.sleep(0.5)
        children = worker.children(recursive=True)
        ranks = [p for p in children if "tasks.worker" in " ".join(p.cmdline())]
    (running,) = server.runs(flow_runs={"state": {"type": {"any_": ["RUNNING"]}}})
    server.command("--no-prompt", "flow-run", "cancel", str(running["id"]))
    _, alive = psutil.wait_procs(ranks, timeout=90)
    assert not alive
    while server.runs(flow_runs={"id": {"any_": [running["id"]]}})[0]["state_type"] != "CANCELLED":
        assert time.monotonic() < deadline + 90
        time.sleep(0.5)
