"""`kdflow doctor` says which backends load here, and why the others do not."""

from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from tasks.forecast.doctor import examine


def test_it_tells_versions_devices_and_backends() -> None:
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for what, detail in (("torch", metadata.version("torch")), ("CPU", "cores"), ("disk", "GB")):
        assert any(what in line and detail in line for line in lines)
    for backend in ("transformers", "sglang", "sglang_server"):
        assert any(f"teacher.type={backend} " in line and "yes" in line for line in lines)


def test_it_says_why_a_backend_does_not_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: "0.1" if n == "sglang" else version(n))
    (sglang,) = [f for f in examine(tmp_path) if f.what == "teacher.type=sglang"]
    assert sglang.works is False
    assert "SGLang 0.1 is installed" in sglang.detail
