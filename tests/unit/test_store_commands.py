"""`kdflow store`: what is there, whether it is whole, and what can go."""

import json
import os
import tarfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from storage.lease import exclusive, lease_name
from storage.runs import record_run
from storage.store import ArtifactStore
from tests.stored import Stored


def local(folder: Path) -> ArtifactStore:
    return ArtifactStore(root=str(folder / "store"), scratch=str(folder / "scratch"))


def kdflow(folder: Path, *arguments: str, input: str | None = None) -> Result:
    options = ["--root", str(folder / "store"), "--scratch", str(folder / "scratch")]
    runner = CliRunner(env={"COLUMNS": "200"})
    return runner.invoke(app, ["store", *options, *arguments], input=input)


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """Two finished artifacts, one of them used by a run, and an unfinished one."""
    store = local(tmp_path)
    used = Stored(store, [16, 9], seed=0xABC)
    used.digest = "abc0" + "0" * 28
    used.finish()
    record_run(store, "nightly", {"extract": f"states/{used.digest}"})
    unused = Stored(store, [16], seed=2)
    unused.digest = "def0" + "0" * 28
    unused.finish()
    unfinished = Stored(store, [16], seed=3)
    unfinished.digest = "fff0" + "0" * 28
    unfinished.writer()
    return used


def make_old(folder: Path) -> None:
    before = time.time() - 10 * 86400
    for path in folder.rglob("*"):
        os.utime(path, (before, before))


def names(folder: Path) -> set[str]:
    return {p.name[:4] for p in (folder / "store/artifacts/states").iterdir()}


def test_ls_and_show(stored: Stored, tmp_path: Path) -> None:
    listing = kdflow(tmp_path, "ls").output
    (line,) = (line for line in listing.splitlines() if "states/abc0" in line)
    assert "finished" in line
    assert "nightly-" in line
    (line,) = (line for line in listing.splitlines() if "states/fff0" in line)
    assert "unfinished" in line
    assert "3 artifacts" in listing
    shown = kdflow(tmp_path, "show", "states/abc").output
    manifest = json.loads(shown[: shown.rindex("}") + 1])
    assert manifest["digest"] == stored.digest
    assert manifest["info"]["layout"]["codec"] == "raw"
    assert "runs: nightly-" in shown


@pytest.mark.parametrize(
    ("name", "message"),
    [("123", "no artifact '123'"), ("fff", "has no manifest: unfinished"), ("", "3 artifacts")],
)
def test_names_that_do_not_name_one(
    stored: Stored, tmp_path: Path, name: str, message: str
) -> None:
    result = kdflow(tmp_path, "show", name)
    assert message in str(result.exception)


def test_verify_finds_and_repairs(stored: Stored, tmp_path: Path) -> None:
    result = kdflow(tmp_path, "verify")
    assert result.exit_code == 0
    assert result.output.count("whole") == 2
    shard = Path(stored.file("states.zarr/hidden/c/1/0/0/0"))
    content = bytearray(shard.read_bytes())
    content[5] ^= 4
    shard.write_bytes(content)
    result = kdflow(tmp_path, "verify", "abc")
    assert result.exit_code == 1
    assert "hidden/c/1/0/0/0 does not have its checksum" in result.output
    assert "removed 1 files" in kdflow(tmp_path, "verify", "--repair").output
    assert stored.store.find("states", stored.digest) is None
    assert stored.writer().missing_shards() == [1]
    stored.finish()
    assert kdflow(tmp_path, "verify").exit_code == 0


def test_rm_asks_and_spares_what_is_being_computed(stored: Stored, tmp_path: Path) -> None:
    result = kdflow(tmp_path, "rm", "abc", input="n\n")
    assert "used by nightly-" in result.output
    assert "abc0" in names(tmp_path)
    with exclusive(stored.store, lease_name("states", stored.digest), lambda _: None):
        assert "is being computed" in str(kdflow(tmp_path, "rm", "abc", "--yes").exception)
    share = f"{lease_name('states', stored.digest)}-share-1-of-2"
    with exclusive(stored.store, share, lambda _: None):
        assert "is being computed" in str(kdflow(tmp_path, "rm", "abc", "--yes").exception)
    kdflow(tmp_path, "rm", "abc", "--yes")
    assert names(tmp_path) == {"def0", "fff0"}
    assert list((tmp_path / "store/leases").iterdir()) == []


def test_gc_removes_what_nothing_refers_to(stored: Stored, tmp_path: Path) -> None:
    assert "0 things" in kdflow(tmp_path, "gc").output  # all of it is new
    stray = Path(stored.file("index.arrow.123.tmp"))
    stray.write_bytes(b"x" * 100)
    copy = tmp_path / "scratch/copies/states/gone/file"
    copy.parent.mkdir(parents=True)
    copy.write_text("copy")
    make_old(tmp_path)
    held = lease_name("states", "fff0" + "0" * 28)
    with exclusive(stored.store, held, lambda _: None):
        assert "fff0" not in kdflow(tmp_path, "gc").output
    listed = kdflow(tmp_path, "gc").output
    assert "states/def0" in listed
    assert "no run refers to it" in listed
    assert "it never finished" in listed
    assert "4 things" in listed
    assert names(tmp_path) == {"abc0", "def0", "fff0"}  # it was a dry run
    kdflow(tmp_path, "gc", "--delete")
    assert names(tmp_path) == {"abc0"}
    assert not stray.exists()
    assert not copy.exists()
    stored.assert_readable(stored.reader())
    assert "0 things" in kdflow(tmp_path, "gc", "--older-than-hours", "0").output


def test_gc_removes_what_only_a_forgotten_run_used(stored: Stored, tmp_path: Path) -> None:
    (record,) = (tmp_path / "store/runs").iterdir()
    assert "forgot the run" in kdflow(tmp_path, "rm", record.stem).output
    kdflow(tmp_path, "gc", "--delete", "--older-than-hours", "0")
    assert names(tmp_path) == set()


def test_an_artifact_travels_in_a_file(stored: Stored, tmp_path: Path) -> None:
    file = tmp_path / "states.tar"
    kdflow(tmp_path, "export", "abc", str(file))
    other = tmp_path / "other"
    result = kdflow(other, "import", str(file))
    assert f"states/{stored.digest} is in the store" in result.output
    copy = Stored(local(other), [16, 9], seed=0xABC)
    copy.digest = stored.digest
    copy.assert_readable(copy.reader())
    assert kdflow(other, "verify").exit_code == 0
    assert kdflow(other, "import", str(file)).exit_code == 0  # it is there already


def test_a_damaged_export_is_no_artifact(stored: Stored, tmp_path: Path) -> None:
    file = tmp_path / "states.tar"
    kdflow(tmp_path, "export", "abc", str(file))
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        place = tar.getmember("states.zarr/hidden/c/0/0/0/0").offset_data
    content[place + 3] ^= 1
    file.write_bytes(content)
    result = kdflow(tmp_path / "other", "import", str(file))
    assert "does not have its checksum" in str(result.exception)
    file.write_bytes(file.read_bytes()[: len(content) // 2])
    result = kdflow(tmp_path / "third", "import", str(file))
    assert result.exit_code == 1
    for folder in ("other", "third"):
        assert local(tmp_path / folder).find("states", stored.digest) is None
    (tmp_path / "text").write_text("no tar at all" * 100)
    result = kdflow(tmp_path, "import", str(tmp_path / "text"))
    assert "is not an exported artifact" in str(result.exception)
