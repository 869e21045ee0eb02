"""Working files with a checksum beside them."""

from pathlib import Path

import pytest

from storage.sealed import is_whole, seal


def test_a_file_is_whole_when_it_is_as_it_was_sealed(tmp_path: Path) -> None:
    path = tmp_path / "part.arrow"
    assert not is_whole(path)
    path.write_bytes(b"content")
    assert not is_whole(path), "a kill may have come before the seal"
    seal(path)
    assert is_whole(path)
    path.write_bytes(b"conTent")
    assert not is_whole(path)


@pytest.mark.parametrize("mark", [b"", b"\xff\xfe", b"[1]"])
def test_an_odd_seal_is_none(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "part.arrow"
    path.write_bytes(b"content")
    seal(path)
    (tmp_path / "part.arrow.xxh3").write_bytes(mark)
    assert not is_whole(path)
