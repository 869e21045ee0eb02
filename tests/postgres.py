"""A PostgreSQL server for tests, as Debian's package installs it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from kdflow_core.workers.ports import free_port

ACCOUNT = "postgres"  # of Debian's package; the server refuses to be root's


def programs() -> Path | None:
    """Where its programs are: those of the newest version; None where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@contextmanager
def running_postgres() -> Iterator[str]:
    """A server of its own with an empty database `prefect`, as SQLAlchemy's URL for asyncpg."""
    # Not in pytest's folders, which are its user's alone.
    with TemporaryDirectory(prefix="kdflow-postgres-") as name:
        yield from _served(Path(name))


def _served(data: Path) -> Iterator[str]:
    bin_folder = programs()
    assert bin_folder is not None
    account: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(data, ACCOUNT)
        account = ["runuser", "-u", ACCOUNT, "--"]

    def run(program: str, *arguments: str) -> None:
        command = [*account, str(bin_folder / program), *arguments]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    port = free_port()
    run("initdb", "--pgdata", str(data / "db"), "--username", "prefect", "--auth", "trust")
    options = f"-c listen_addresses=127.0.0.1 -p {port} -k {data} -c fsync=off"
    control = ["--pgdata", str(data / "db"), "--log", str(data / "log"), "--wait"]
    run("pg_ctl", "start", *control, "--options", options)
    try:
        run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "prefect")
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
    finally:
        run("pg_ctl", "stop", "--pgdata", str(data / "db"), "--mode", "immediate")
