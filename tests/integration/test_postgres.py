"""A server for a team, as docs/server.md has it: PostgreSQL, two workers, one store."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import httpx
import pytest

from storage.store import ArtifactStore
from tests.postgres import programs, running_postgres
from tests.prefect_server import Server, start_server
from tests.processes import PATIENCE_S

pytestmark = [pytest.mark.prefect, pytest.mark.ranks]
WORKERS = ("one", "two")


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if programs() is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with running_postgres() as url:
        monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", url)
        yield url.replace("+asyncpg", "")


@pytest.fixture
def server(database: str, tmp_path: Path, migrated: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    running = start_server(folder, migrated)
    yield running
    running.stop()


async def flow_runs(database: str) -> list[str]:
    """The states of the flow's runs, as they stand in the database."""
    connection = await asyncpg.connect(database)
    found = await connection.fetch("SELECT state_type FROM flow_run")
    await connection.close()
    return [str(row["state_type"]) for row in found]


def test_two_workers_share_a_server_and_a_store(
    server: Server, database: str, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Two runs at a time on the same data and teacher; what they share is made once."""
    server.command("work-pool", "create", "local", "--type", "process")
    server.command("deploy", "--all")
    for name in WORKERS:
        one_at_a_time = ("--pool", "local", "--name", name, "--limit", "1")
        server.processes.append(server.start("worker", "start", *one_at_a_time))
    recipe = make_recipe()
    started = []
    for lr in (0.003, 0.002):
        given = ("--param", f"recipe={recipe}", "--param", f'overrides={{"student.lr": {lr}}}')
        server.command("deployment", "run", "kd/offpolicy", *given)
        started = [run["id"] for run in server.runs() if "nightly" not in str(run["tags"])]
    deadline = time.monotonic() + PATIENCE_S
    while True:
        runs = server.runs(flow_runs={"id": {"any_": started}})
        states = {str(run["state_type"]) for run in runs}
        if states == {"COMPLETED"}:
            break
        assert not states & {"FAILED", "CRASHED"}, [run["state"] for run in runs]
        assert time.monotonic() < deadline, states
        time.sleep(1)
    assert len(started) == 2
    assert asyncio.run(flow_runs(database)).count("COMPLETED") == 2
    store = ArtifactStore(root=str(tmp_path / "store"), scratch=str(tmp_path / "scratch"))
    made = [store.list_names(f"{store.root}/artifacts/{kind}") for kind in ("states", "student")]
    assert [len(names) for names in made] == [1, 2]
    workers = httpx.post(f"{server.api}/work_pools/local/workers/filter", json={}).json()
    assert {worker["name"] for worker in workers} == set(WORKERS)
