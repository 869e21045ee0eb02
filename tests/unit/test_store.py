"""Artifacts: no manifest, no artifact; damaged ones are not served."""

from pathlib import Path

import pytest

from storage.artifact import ArtifactRef
from storage.digest import artifact_digest, digest
from storage.errors import ArtifactMissingError, StoreCorruptError, StoreError, StoreFullError
from storage.fingerprint import Fingerprints
from storage.store import ArtifactStore

KEY = "0" * 32


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    root = str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}"
    return ArtifactStore(root=root, scratch=str(tmp_path / "scratch"))


def make(store: ArtifactStore, key: str = KEY) -> ArtifactRef:
    folder = store.workdir("tokens", key)
    (folder / "sub").mkdir()
    (folder / "a.txt").write_text("abc")
    (folder / "sub/b.txt").write_text("defgh")
    files = store.publish("tokens", key, folder)
    return store.commit(
        kind="tokens",
        digest=key,
        code_version=1,
        config={"x": 1},
        inputs={"data": "d"},
        files=files,
        counts={"rows": 2},
        info={},
        seconds=1.5,
    )


def test_published_files_and_manifest(store: ArtifactStore) -> None:
    assert store.find("tokens", KEY) is None
    ref = make(store)
    assert store.find("tokens", KEY) == ref
    assert ref.num_bytes == 8
    assert ArtifactRef.model_validate_json(ref.model_dump_json()) == ref
    manifest = store.manifest("tokens", KEY)
    assert [r.path for r in manifest.files] == ["a.txt", "sub/b.txt"]
    assert manifest.versions["torch"]
    assert (store.local_copy(ref) / "sub/b.txt").read_text() == "defgh"


def test_files_without_manifest_are_no_artifact(store: ArtifactStore) -> None:
    make(store)
    store.retract("tokens", KEY)
    assert store.why_absent("tokens", KEY) == "never finished"
    with pytest.raises(ArtifactMissingError, match="no artifact tokens/0000"):
        store.manifest("tokens", KEY)


def test_damage_is_noticed(store: ArtifactStore) -> None:
    make(store)
    path = f"{store.folder('tokens', KEY)}/a.txt"
    store.fs.pipe_file(path, b"abcd")
    assert store.why_absent("tokens", KEY) == "file a.txt has 4 bytes, recorded were 3"
    store.fs.rm_file(path)
    assert store.why_absent("tokens", KEY) == "file a.txt is gone"
    store.fs.pipe_file(f"{store.folder('tokens', KEY)}/manifest.json", b"{}")
    assert "is not a manifest" in (store.why_absent("tokens", KEY) or "")
    with pytest.raises(StoreCorruptError, match="is not a manifest"):
        store.manifest("tokens", KEY)
    assert store.newest_manifests("tokens", 9) == []


def test_a_remote_file_with_another_content_is_not_copied(tmp_path: Path) -> None:
    store = ArtifactStore(root=f"memory://{tmp_path.name}", scratch=str(tmp_path))
    ref = make(store)
    store.fs.pipe_file(f"{store.folder('tokens', KEY)}/a.txt", b"xyz")
    with pytest.raises(StoreCorruptError, match=r"a\.txt does not have its checksum"):
        store.local_copy(ref)


def test_what_does_not_fit_is_refused_beforehand(tmp_path: Path) -> None:
    store = ArtifactStore(root=str(tmp_path), scratch=str(tmp_path))
    with pytest.raises(StoreFullError, match=r"the states needs 1000000000\.000 GB"):
        store.require_room(10**18, "the states")
    store.require_room(1, "a byte")


def test_digest_is_of_the_value_and_not_of_its_spelling() -> None:
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": [1.5, None], "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"})
    with pytest.raises(ValueError, match="Out of range"):
        digest(float("nan"))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "states"},
        {"code_version": 2},
        {"config": {"x": 2}},
        {"inputs": {"data": "e"}},
        {"inputs": {"other": "d"}},
    ],
)
def test_everything_that_identifies_changes_the_digest(change: dict[str, object]) -> None:
    base = {"kind": "tokens", "code_version": 1, "config": {"x": 1}, "inputs": {"data": "d"}}
    assert artifact_digest(**base) != artifact_digest(**(base | change))  # type: ignore[arg-type]


def test_fingerprints_follow_content_and_not_name_or_time(tmp_path: Path) -> None:
    prints = Fingerprints(str(tmp_path / "scratch"))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in "ab":
        (tmp_path / folder / "x.txt").write_text("same")
    first = prints.files(str(tmp_path / "a"))
    assert first == prints.files(str(tmp_path / "b")) == prints.files(str(tmp_path / "a/*.txt"))
    (tmp_path / "a/x.txt").write_text("diff")
    assert Fingerprints(str(tmp_path / "scratch")).files(str(tmp_path / "a")) != first


def test_fingerprint_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no file at"):
        Fingerprints(str(tmp_path)).files(str(tmp_path / "nothing.jsonl"))
