"""Students that leave the store: to a folder, a hub, and llama.cpp's converter."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from flows import export_command
from tests.command import kdflow


@pytest.fixture
def student(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The student of a run `mine`."""
    runs = {"mine": SimpleNamespace(refs={"train": student_folder})}
    monkeypatch.setattr(export_command, "chosen_runs", lambda _store, names: [runs[names[0]]])
    monkeypatch.setattr(export_command, "student_path", lambda _store, ref: ref)
    return student_folder


class Hub(BaseHTTPRequestHandler):
    """What an upload asks of a hub: it keeps the files of each commit, by model."""

    models: dict[str, dict[str, object]]

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("/revision")[0]
        self._answer(200 if name in self.models else 404, {"id": name, "siblings": []})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode() if length else self._chunks()
        if self.headers.get("Authorization") != "Bearer right":
            return self._answer(401, {"error": "no right to write"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.models[name] = {"private": asked.get("visibility") == "private"}
            return self._answer(200, {"url": f"{self._address}/{name}"})
        name = self.path.removeprefix("/api/models/").partition("/preupload")[0]
        if "preupload" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        name = name.partition("/commit")[0]
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            if line["key"] == "file":
                self.models[name][line["value"]["path"]] = line["value"]["content"]
        commit = f"{self._address}/{name}/commit/1"
        return self._answer(200, {"commitUrl": commit, "commitOid": "1", "success": True})

    @property
    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _chunks(self) -> str:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts).decode()

    def _answer(self, code: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        if code == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("OwnHub", (Hub,), {"models": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=address))
    yield handler
    server.shutdown()
    server.server_close()


def test_a_student_goes_to_the_hub(
    student: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    said = kdflow("export", "mine", "--hub", "me/small", code=1)
    assert "me/small cannot be written on the hub" in said
    assert "hf auth login" in said
    monkeypatch.setenv("HF_TOKEN", "right")
    assert "commit/1" in kdflow("export", "mine", "--hub", "small", "--private")
    (written,) = hub.models.values()
    assert hub.models.keys() == {"me/small"}
    assert written["private"] is True
    files = {path.name for path in student.iterdir()}
    assert written.keys() - {"private"} == files
    written.clear()
    kdflow("export", "mine", "--hub", "me/small")
    assert written.keys() == files, "what is there stays as private as it is"


def test_a_student_goes_to_a_folder(student: Path, tmp_path: Path) -> None:
    kdflow("export", "mine", "--folder", str(tmp_path / "copy"))
    weights = "model.safetensors"
    assert (tmp_path / "copy" / weights).read_bytes() == (student / weights).read_bytes()
    said = kdflow("export", "mine", "--folder", str(tmp_path / "copy"), code=1)
    assert "is there already" in said
    assert "--folder, --hub or --gguf" in kdflow("export", "mine", code=1)


@pytest.mark.usefixtures("student")
def test_a_student_is_given_to_the_converter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's own is not here: a program in its place says what it was called with."""
    target = tmp_path / "student.gguf"
    monkeypatch.setenv("PATH", str(tmp_path))
    said = kdflow("export", "mine", "--gguf", str(target), code=1)
    assert "needs llama.cpp's convert_hf_to_gguf.py" in said
    program = tmp_path / "convert_hf_to_gguf.py"
    program.write_text('#!/bin/sh\necho "$@" > "$3"\n')
    program.chmod(0o755)
    assert str(target) in kdflow("export", "mine", "--gguf", str(target))
    assert target.read_text().split()[1:] == ["--outfile", str(target)]
    program.write_text("#!/bin/sh\necho no such architecture >&2\nexit 1\n")
    target.unlink()
    assert "no such architecture" in kdflow("export", "mine", "--gguf", str(target), code=1)
