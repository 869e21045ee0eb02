"""`kdflow store verify`: what was made of damage is made again, and the scratch folder counts."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from kdflow_core.student.seal import write_seal
from storage.artifact import ArtifactRef
from storage.store import ArtifactStore, file_record


def local(folder: Path) -> ArtifactStore:
    return ArtifactStore(root=str(folder / "store"), scratch=str(folder / "scratch"))


def verify(folder: Path, *arguments: str) -> Result:
    options = ["--root", str(folder / "store"), "--scratch", str(folder / "scratch")]
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["store", *options, "verify", *arguments])


def made(
    store: ArtifactStore, name: str, inputs: dict[str, str], config: dict[str, object] | None = None
) -> ArtifactRef:
    """An artifact of one file; its name is `kind-N`."""
    kind, number = name.split("-")
    digest = f"{int(number):032x}"
    folder = Path(store.folder(kind, digest))
    folder.mkdir(parents=True)
    (folder / "file").write_text(name)
    return store.commit(
        kind=kind,
        digest=digest,
        code_version=1,
        config=config or {},
        inputs=inputs,
        files=[file_record(folder / "file", "file")],
        counts={},
        info={},
        seconds=0.0,
    )


def damage(store: ArtifactStore, ref: ArtifactRef) -> None:
    path = Path(ref.uri) / "file"
    path.write_text(path.read_text().upper())  # of the same size
    assert store.find(ref.kind, ref.digest) is None


def test_descendants_are_taken_back(tmp_path: Path) -> None:
    store = local(tmp_path)
    tokens = made(store, "tokens-1", {})
    other = made(store, "tokens-2", {})
    states = made(store, "states-3", {"tokens": tokens.digest})
    student = made(store, "student-4", {"tokens": tokens.digest, "states": states.digest})
    report = made(store, "report-5", {"student": student.digest})
    unrelated = made(store, "student-6", {"tokens": other.digest})
    damage(store, tokens)
    looked = verify(tmp_path)
    assert looked.exit_code == 1
    assert looked.output.count("made of what is damaged") == 3
    assert store.find(report.kind, report.digest) is not None, "it was only looked at"
    assert verify(tmp_path, "--repair").exit_code == 1
    for ref in (tokens, states, student, report):
        assert store.find(ref.kind, ref.digest) is None
    assert not Path(states.uri).exists(), "its finished shards would serve on"
    assert (Path(student.uri) / "file").exists(), "nothing is thrown away that costs days"
    for ref in (other, unrelated):
        assert store.find(ref.kind, ref.digest) is not None
    assert verify(tmp_path).exit_code == 0


def test_rounds_behind_a_damaged_one_are_taken_back(tmp_path: Path) -> None:
    store, inputs = local(tmp_path), {"tokens": "t"}
    config: dict[str, object] = {"seed": 0}
    rounds = {
        f"{kind}-{10 * number + place}": made(
            store, f"{kind}-{10 * number + place}", inputs, config | {"round": number}
        )
        for number in (1, 2, 3)
        for place, kind in enumerate(("rollouts", "round"))
    }
    student = made(store, "student-99", inputs, config)
    foreign = made(store, "student-98", inputs, {"seed": 1})
    damage(store, rounds["rollouts-20"])
    verify(tmp_path, "--repair")
    there = {name for name, ref in rounds.items() if store.find(ref.kind, ref.digest)}
    assert there == {"rollouts-10", "round-11"}
    assert store.find(student.kind, student.digest) is None
    assert store.find(foreign.kind, foreign.digest) is not None


def test_a_damaged_manifest_is_removed(tmp_path: Path) -> None:
    store = local(tmp_path)
    tokens = made(store, "tokens-1", {})
    manifest = Path(tokens.uri) / "manifest.json"
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(fields | {"seconds": 7.0}))
    assert "does not have its checksum" in verify(tmp_path).output
    verify(tmp_path, "--repair")
    assert not manifest.exists()
    assert verify(tmp_path).exit_code == 0


@pytest.mark.parametrize("copies", ["copies", "read-cache"])
def test_damaged_copies_and_checkpoints_are_found(tmp_path: Path, copies: str) -> None:
    store = local(tmp_path)
    tokens = made(store, "tokens-1", {})
    copy = store.scratch / copies / "tokens" / tokens.digest / "file"
    copy.parent.mkdir(parents=True)
    copy.write_text("TOKENS-1")
    whole, bad = (store.scratch / f"student/abc/checkpoints/step-0000000{step}" for step in (1, 2))
    for folder in (whole, bad):
        folder.mkdir(parents=True)
        (folder / ".metadata").write_text("m")
        (folder / "__0_0.distcp").write_text("data")
        write_seal(folder, rank=0, ranks=1)
    (bad / "__0_0.distcp").write_text("dAta")
    result = verify(tmp_path)
    assert result.exit_code == 1
    assert f"{copy}: is not what the store has" in result.output
    assert "__0_0.distcp does not have its checksum" in result.output
    assert copy.exists()
    verify(tmp_path, "--repair")
    assert not copy.exists()
    assert not bad.exists()
    assert whole.exists()
    assert verify(tmp_path).exit_code == 0
