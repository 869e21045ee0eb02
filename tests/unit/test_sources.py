"""Data files as they are: one bad line costs itself, and a bad file is named."""

import bz2
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.schema.data import FilesSource
from kdflow_core.data.messages import SampleError
from kdflow_core.data.sources import iterate_rows
from kdflow_core.errors import DataError
from storage import data_files
from storage.data_files import DataFiles
from storage.errors import StoreError
from storage.fingerprint import Fingerprints

ROW = {"prompt": "a", "completion": "b"}
LINE = json.dumps(ROW).encode()


def read(path: Path, **fields: Any) -> list[Any]:
    """Rows, and in place of broken ones their errors' texts."""
    source = FilesSource(path=str(path), **fields)
    return [
        f"{row.reason}: {row}" if isinstance(row, SampleError) else row
        for row in iterate_rows(source, DataFiles())
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", "is not JSON"),
        (b'"text"', "is not a JSON object"),
        (b"[1, 2]", "is not a JSON object"),
        (b'{"prompt": "\xff"}', "is not UTF-8"),
        (b'{"n": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (b'{"n": ' + b"[" * 100_000, "nested too deeply"),
        (b"\x00\x01\x02", "is not JSON"),
        (LINE[: len(LINE) // 2], "is not JSON"),
    ],
)
def test_a_bad_line_costs_itself_and_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join([LINE, line, LINE]))
    first, second, third = read(path)
    assert first == third == ROW
    assert second.startswith(f"malformed: {path} line 2 ")
    assert message in second


def test_marks_and_ends_of_lines_of_other_systems(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINE + b"\r\n" + LINE + b"\r\n")
    assert read(path) == [ROW, ROW]


def test_a_line_without_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "CHUNK_BYTES", 64)
    monkeypatch.setattr(data_files, "MAX_LINE_BYTES", 256)
    path = tmp_path / "d.jsonl"
    path.write_bytes(
        LINE + b"\n" + b'{"prompt": "' + b"x" * 5000 + b'"}\n' + LINE + b"\n" + b"y" * 999
    )
    rows = read(path)
    assert [rows[0], rows[2]] == [ROW, ROW]
    assert rows[1] == f"malformed: {path} line 2 is too long to be a sample"
    assert rows[3] == f"malformed: {path} line 4 is too long to be a sample"


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_too(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "d.json"
    path.write_text("\n" + json.dumps([ROW, ROW], indent=indent) + "\n")
    assert read(path) == [ROW, ROW]


def test_lines_that_are_arrays_are_no_array(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"[1]\n" + LINE)
    assert read(path) == [f"malformed: {path} line 1 is not a JSON object", ROW]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst", ".lz4"])
def test_compressed_files_need_no_further_package(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"d.jsonl{suffix}"
    with pa.CompressedOutputStream(
        str(path), {"gz": "gzip", "zst": "zstd"}.get(suffix[1:], suffix[1:])
    ) as out:
        out.write(LINE + b"\n" + LINE)
    assert read(path) == [ROW, ROW]
    whole = path.read_bytes()
    path.write_bytes(whole[:-6])
    with pytest.raises(DataError, match=rf"cannot read .*{path.name} behind line \d"):
        read(path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    lines = b"\n".join(json.dumps(ROW | {"n": os.urandom(20).hex()}).encode() for _ in range(999))
    for name, data in (("a.jsonl.gz", gzip.compress(lines)), ("b.jsonl.bz2", bz2.compress(lines))):
        broken = bytearray(data)
        broken[len(data) // 2 : len(data) // 2 + 8] = b"\0" * 8
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(DataError, match=f"cannot read .*{name} behind line"):
            read(tmp_path / name)
        (tmp_path / name).write_bytes(b"this is no archive")
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)


def test_two_archives_in_one_are_both_read(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(LINE + b"\n") + gzip.compress(LINE + b"\n"))
    assert read(tmp_path / "d.jsonl.gz") == [ROW, ROW]


@pytest.mark.parametrize("name", ["d[1].jsonl", "d*.jsonl", "what?.jsonl", "[a-z].jsonl"])
def test_a_name_of_a_file_is_no_glob(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LINE)
    (tmp_path / "d1.jsonl").write_bytes(b"{}")
    assert read(tmp_path / name) == [ROW]
    prints = Fingerprints(str(tmp_path / "scratch"))
    assert set(prints.files(str(tmp_path / name))) == {name}


def test_a_glob_is_one_where_no_file_has_its_name(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(LINE)
    assert read(tmp_path / "[ab].jsonl") == [ROW, ROW]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "d.jsonl")
    with pytest.raises(DataError, match="is not a regular file"):
        read(tmp_path / "d.jsonl")
    with pytest.raises(StoreError, match="is not a regular file"):
        Fingerprints(str(tmp_path / "scratch")).files(str(tmp_path / "d.jsonl"))


def test_text_in_parquet_that_is_none_costs_its_row(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": texts, "completion": pa.array(["x", "y", "z"])})
    pq.write_table(table, tmp_path / "d.parquet")
    first, second, third = read(tmp_path / "d.parquet")
    assert first == {"prompt": "a", "completion": "x"}
    assert second.startswith(f"malformed: {tmp_path / 'd.parquet'} row 2 is not text")
    assert third["prompt"] == "c"


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_a_damaged_table_is_named(tmp_path: Path, name: str) -> None:
    for data in (b"", b"ARROW1 and no more", os.urandom(100)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"cannot read .*{name}"):
            read(tmp_path / name)


def test_parquet_lists_of_structs(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == rows
