"""Secrets in every place where a user can put one: nothing that a run writes or prints has them."""

import base64
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from tests.command import kdflow
from tests.readme import ROOT
from tests.terminal import fresh_home

pytestmark = [pytest.mark.prefect, pytest.mark.ranks]
USER, PASSWORD, SIGNATURE = "planted-user", "planted-password", "planted-signature"
SECRETS = [USER, PASSWORD, SIGNATURE]


@pytest.fixture
def address(data_file: Path) -> Iterator[str]:
    """A server that gives the data to who has the password and the signature."""
    content = data_file.read_bytes()
    basic = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            allowed = self.headers.get("Authorization") == basic and SIGNATURE in self.path
            self.send_response(200 if allowed else 403)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", '"one"')
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Path:
    """Where somebody has all files; what one run leaves is there for the next, too."""
    folder = tmp_path_factory.mktemp("all")
    shutil.copytree(migrated, folder / "prefect")
    return folder


def run(recipe: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`kdflow run` by somebody whose every file is in `folder`."""
    env = fresh_home(folder) | {
        "TMPDIR": str(folder / "tmp"),
        "HOME": str(folder / "home"),
        "HF_HOME": str(folder / "hf"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    env.pop("HF_DATASETS_CACHE", None)
    for name in ("tmp", "home"):
        (folder / name).mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "flows", "run", str(recipe), *overrides],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def places_of_secrets(folder: Path) -> list[str]:
    """Files of a folder that hold one, by name or content."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        if any(s.encode() in content or s in path.name for s in SECRETS):
            found.append(str(path))
    return found


@pytest.mark.parametrize("outcome", ["fails", "works"])
def test_planted_secrets_are_nowhere(
    make_recipe: Callable[..., Path], tmp_path: Path, folder: Path, address: str, outcome: str
) -> None:
    recipe = yaml.safe_load(make_recipe(max_steps=2).read_text())
    recipe["storage"] |= {"root": str(folder / "store"), "scratch": str(folder / "scratch")}
    path = tmp_path / "secret.yaml"
    path.write_text(yaml.safe_dump(recipe))
    query = SIGNATURE if outcome == "works" else f"wrong-{SIGNATURE[:-1]}"
    url = f"http://{USER}:{PASSWORD}@{address}/sums.jsonl?X-Amz-Signature={query}"
    result = run(path, folder, f"data.sources.0.path={url}")
    assert (result.returncode == 0) == (outcome == "works"), result.stdout + result.stderr
    for secret in (*SECRETS, query):
        assert secret not in result.stdout + result.stderr
    assert places_of_secrets(folder) == []
    if outcome == "works":
        reports = list((folder / "store/artifacts/report").glob("*/report.html"))
        assert f"http://{address}/sums.jsonl" in reports[0].read_text()
        # Another signature of the same data is the same run.
        again = kdflow("run", str(path), f"data.sources.0.path={url}-of-another-day")
        assert "served from cache: tokenize, extract, train, evaluate, report" in again


def test_a_teachers_server_with_a_password(
    make_recipe: Callable[..., Path], tmp_path: Path, folder: Path
) -> None:
    """It is not there; what is said about it names the host alone."""
    recipe = yaml.safe_load(make_recipe(max_steps=2).read_text())
    recipe["storage"] |= {"root": str(folder / "store"), "scratch": str(folder / "scratch")}
    url = f"http://{USER}:{PASSWORD}@127.0.0.1:9"
    recipe["teacher"] |= {"type": "sglang_server", "url": url}
    path = tmp_path / "secret.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = run(path, folder)
    assert result.returncode == 1
    assert "http://127.0.0.1:9" in result.stdout + result.stderr
    assert not any(secret in result.stdout + result.stderr for secret in SECRETS)
    assert places_of_secrets(folder) == []
    assert os.listdir(folder / "tmp") == [], "it has left temporary files"
