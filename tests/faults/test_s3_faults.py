"""The store on an S3 server that answers 500 and drops connections."""

import http.client
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from storage.lease import exclusive, is_held
from storage.maintenance import damages, find_entry
from storage.store import ArtifactStore
from tests.stored import Stored

pytestmark = pytest.mark.ranks
FAULTS = ("error", "drop", "lose the answer")


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to a server; of every four requests one fails, in one of three ways."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.target_port = port
        self.chance = 0.0
        self.random = random.Random(0)
        self.faults: dict[str, int] = dict.fromkeys(FAULTS, 0)


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = None
        if self.server.random.random() < self.server.chance:
            fault = self.server.random.choice(FAULTS)
            self.server.faults[fault] += 1
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "error":
            self.answer(500, [("Content-Length", "0")], b"")
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.target_port)
        upstream.request(self.command, self.path, body, dict(self.headers))
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        if fault == "lose the answer":  # it was done, but nobody is told
            self.close_connection = True
            return
        self.answer(response.status, response.getheaders(), content)

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in {"connection", "transfer-encoding", "date", "server"}:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = FaultyProxy(server.get_host_and_port()[1])
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # fsspec keeps file systems by their arguments, and the endpoint is none of them.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fsspec.filesystem("s3").makedirs("kdflow-faults", exist_ok=True)
    yield proxy
    proxy.shutdown()
    proxy.server_close()
    server.stop()


def test_states_survive_an_unreliable_endpoint(proxy: FaultyProxy, tmp_path: Path) -> None:
    store = ArtifactStore(root=f"s3://kdflow-faults/{tmp_path.name}", scratch=str(tmp_path))
    proxy.chance = 0.25
    stored = Stored(store, [13] * 25)
    attempts = 0
    with exclusive(store, "work", lambda _: None):
        while True:
            attempts += 1
            try:
                stored.finish()
                break
            except OSError:  # more failures in a row than the client retries
                assert attempts < 20
    assert not is_held(store, "work")
    reader = stored.reader()
    stored.assert_readable(reader)
    assert all(count > 0 for count in proxy.faults.values()), proxy.faults
    proxy.chance = 0.0
    assert list(damages(store, find_entry(store, stored.digest))) == []


def test_of_two_creators_on_s3_one_wins(proxy: FaultyProxy, tmp_path: Path) -> None:
    store = ArtifactStore(root=f"s3://kdflow-faults/{tmp_path.name}", scratch=str(tmp_path))
    wins: list[int] = []
    start = threading.Barrier(8)

    def create(number: int) -> None:
        start.wait()
        if store.create(f"{store.root}/one", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=create, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert store.fs.cat_file(f"{store.root}/one") == str(wins[0]).encode()
