"""Write and replay speed of the hidden-state store against plain ways to keep rows in files.

`python -m tests.benchmarks.store FOLDER`. Every subject holds the same rows (bfloat16 bits,
sequences of about 500 rows) and copies them, sequence by sequence, into one buffer. Within a round
the subjects take turns; the best round counts. Cold reads begin with the files dropped from the
page cache; `dd` reads the shard files of the store with O_DIRECT.

Dimensions: R rows, N rows of a sequence, H hidden size.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from kdflow_core.contracts import TokenSequence
from kdflow_core.student.prefetch import PrefetchedStates
from storage.states.layout import Sequences, plan_layout
from storage.states.reader import HiddenStateReader
from storage.states.writer import HiddenStateWriter
from storage.store import ArtifactStore
from tasks.jobs.stored import StoredStates
from tests.benchmarks.subjects import work_folder

CODECS = ("raw", "planes", "int8")
SEQUENCES_OF_STEP = 32


class Rows:
    """The data: rows [R, H] and the digests and bounds of the sequences that they belong to."""

    def __init__(self, num_bytes: int, hidden: int) -> None:
        rng = np.random.default_rng(0)
        lengths = rng.integers(250, 750, num_bytes // (2 * hidden * 500))
        self.ends = np.cumsum(lengths)
        self.begins = self.ends - lengths
        self.bits_RH = np.empty((int(self.ends[-1]), hidden), np.uint16)
        scale_H = np.exp(rng.normal(size=hidden)).astype(np.float32)  # channels are uneven
        for begin in range(0, len(self.bits_RH), 4096):
            part = self.bits_RH[begin : begin + 4096]
            values = rng.standard_normal(part.shape, np.float32) * scale_H
            part[:] = values.view(np.uint32) >> 16
        ids = [np.full(n + 1, i, np.int32) for i, n in enumerate(lengths)]
        sequences = [TokenSequence(ids_T=i, supervised_T=np.arange(len(i)) > 0) for i in ids]
        self.sequences = sorted(sequences, key=lambda s: s.digest)
        self.keys = [(s.digest, s.target_ids_N) for s in self.sequences]
        # Sequence number k of this list has the k-th stretch of rows.
        self.lengths = np.array([len(s.target_ids_N) for s in self.sequences])
        self.ends = np.cumsum(self.lengths)
        self.begins = self.ends - self.lengths

    def of(self, number: int) -> np.ndarray:
        """One sequence's rows."""
        return self.bits_RH[self.begins[number] : self.ends[number]]

    def planned(self) -> Sequences:
        digests = b"".join(s.digest for s in self.sequences)
        return Sequences(
            digests=np.frombuffer(digests, np.uint8).reshape(-1, 16),
            num_rows=self.lengths.astype(np.int32),
            source=np.zeros(len(self.lengths), np.int16),
            source_names=("random",),
        )


def drop_from_cache(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Kdflow:
    """Our store with one codec."""

    def __init__(self, rows: Rows, folder: Path, codec: str) -> None:
        self.rows, self.folder, self.codec = rows, folder, codec

    def write(self) -> None:
        store = ArtifactStore(root=str(self.folder), scratch=str(self.folder / "scratch"))
        layout = plan_layout(
            hidden_size=self.rows.bits_RH.shape[1],
            num_rows=self.rows.lengths,
            shard_rows=None,
            chunk_rows=None,
            codec=self.codec,
        )
        writer = HiddenStateWriter(
            store=store,
            kind="states",
            digest="0" * 32,
            layout=layout,
            sequences=self.rows.planned(),
        )
        for shard in writer.missing_shards():
            numbers = writer.sequences_of(shard)
            writer.write_shard(
                shard,
                [self.rows.of(i) for i in numbers],
                [self.rows.sequences[i].target_ids_N for i in numbers],
            )
        files, _ = writer.close()
        ref = store.commit(
            kind="states",
            digest="0" * 32,
            code_version=1,
            config={},
            inputs={},
            files=files,
            counts={},
            info={"layout": asdict(layout)},
            seconds=0.0,
        )
        self.store, self.ref = store, ref

    def open(self) -> HiddenStateReader:
        return HiddenStateReader(store=self.store, ref=self.ref)

    def read(self, order: list[int]) -> Iterator[np.ndarray]:
        """By the reader of `read_verified`: what it has read once it does not hash again."""
        for i in order:
            yield self.reader.rows(*self.rows.keys[i])

    def read_verified(self, order: list[int]) -> Iterator[np.ndarray]:
        """By a new reader, which hashes everything."""
        self.reader = self.open()
        return self.read(order)

    def read_ahead(self, order: list[int]) -> Iterator[np.ndarray]:
        """As training does: hashed, and by threads some steps ahead."""
        steps = [order[k : k + SEQUENCES_OF_STEP] for k in range(0, len(order), SEQUENCES_OF_STEP)]
        states = PrefetchedStates(
            StoredStates(self.open()),
            sequences_of=lambda step: [self.rows.sequences[i] for i in steps[step]],
            num_steps=len(steps),
        )
        for step, numbers in enumerate(steps):
            states.begin_step(step)
            for i in numbers:
                found_NH = states.rows(self.rows.sequences[i]).buffer_RH
                yield found_NH.view(torch.int16).numpy().view(np.uint16)
        states.close()


class Memmap:
    """All rows in one file."""

    def __init__(self, rows: Rows, folder: Path) -> None:
        self.rows, self.folder = rows, folder

    def write(self) -> None:
        self.folder.mkdir(parents=True)
        with (self.folder / "rows").open("wb") as file:
            self.rows.bits_RH.tofile(file)
            os.fsync(file.fileno())

    def read(self, order: list[int]) -> Iterator[np.ndarray]:
        mapped = np.memmap(self.folder / "rows", np.uint16, "r", shape=self.rows.bits_RH.shape)
        for i in order:
            yield mapped[self.rows.begins[i] : self.rows.ends[i]]


class Files(Memmap):
    """About 64 MiB of sequences per file."""

    def shards(self) -> list[range]:
        size = max(
            1, (64 << 20) // (int(self.rows.lengths.mean()) * 2 * self.rows.bits_RH.shape[1])
        )
        count = len(self.rows.lengths)
        return [range(k, min(k + size, count)) for k in range(0, count, size)]

    def place(self) -> dict[int, int]:
        return {i: k for k, numbers in enumerate(self.shards()) for i in numbers}


class Safetensors(Files):
    def write(self) -> None:
        self.folder.mkdir(parents=True)
        for k, numbers in enumerate(self.shards()):
            rows = self.rows.bits_RH[self.rows.begins[numbers[0]] : self.rows.ends[numbers[-1]]]
            save_file({"rows": rows}, self.folder / f"{k}.safetensors")
        os.sync()

    def read(self, order: list[int]) -> Iterator[np.ndarray]:
        place, shards = self.place(), self.shards()
        opened = [
            safe_open(self.folder / f"{k}.safetensors", "np").get_slice("rows")
            for k in range(len(shards))
        ]
        for i in order:
            first = self.rows.begins[shards[place[i]][0]]
            yield opened[place[i]][
                int(self.rows.begins[i] - first) : int(self.rows.ends[i] - first)
            ]


class Parquet(Files):
    """A row group per sequence, uncompressed."""

    def write(self) -> None:
        self.folder.mkdir(parents=True)
        schema = pa.schema([("row", pa.binary(2 * self.rows.bits_RH.shape[1]))])
        for k, numbers in enumerate(self.shards()):
            path = self.folder / f"{k}.parquet"
            with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as file:
                for i in numbers:
                    rows = self.rows.of(i)
                    column = pa.FixedSizeBinaryArray.from_buffers(
                        schema[0].type, len(rows), [None, pa.py_buffer(rows)]
                    )
                    file.write_table(pa.table([column], schema=schema))
        os.sync()

    def read(self, order: list[int]) -> Iterator[np.ndarray]:
        place, shards = self.place(), self.shards()
        opened = [pq.ParquetFile(self.folder / f"{k}.parquet") for k in range(len(shards))]
        for i in order:
            table = opened[place[i]].read_row_group(i - shards[place[i]][0])
            column = table.column(0).chunk(0)
            yield np.frombuffer(column.buffers()[1], np.uint16).reshape(len(column), -1)


def copied(
    rows: Rows, read: Callable[[list[int]], Iterator[np.ndarray]], order: list[int]
) -> float:
    """Seconds to copy all sequences into one buffer."""
    buffer_NH = np.empty((int(rows.lengths.max()), rows.bits_RH.shape[1]), np.uint16)
    begin = time.perf_counter()
    for found in read(order):
        np.copyto(buffer_NH[: len(found)], found)
    return time.perf_counter() - begin


def dd(folder: Path) -> float:
    """Seconds to read the store's shards past the page cache."""
    paths = sorted(p for p in folder.rglob("hidden/c/*/0/0/0"))
    begin = time.perf_counter()
    for path in paths:
        command = ["dd", f"if={path}", "of=/dev/null", "bs=16M", "iflag=direct", "status=none"]
        subprocess.run(command, check=True)
    return time.perf_counter() - begin


def measure(folder: Path, rows: Rows, rounds: int) -> dict[str, dict[str, float]]:
    """MB/s of row data by subject: the best of the rounds."""
    ours = {codec: Kdflow(rows, folder / codec, codec) for codec in CODECS}
    plain = {
        "memmap": Memmap(rows, folder / "memmap"),
        "safetensors": Safetensors(rows, folder / "safetensors"),
        "parquet": Parquet(rows, folder / "parquet"),
    }
    seconds: dict[str, dict[str, float]] = {}

    def note(test: str, subject: str, taken: float) -> None:
        best = seconds.setdefault(test, {})
        best[subject] = min(best.get(subject, taken), taken)

    in_order = list(range(len(rows.lengths)))
    shuffled = [int(i) for i in np.random.default_rng(1).permutation(len(in_order))]
    for _ in range(rounds):
        for name, subject in (ours | plain).items():
            shutil.rmtree(folder / name, ignore_errors=True)
            begin = time.perf_counter()
            subject.write()
            note("write", name, time.perf_counter() - begin)
        for test, order in (("sequential", in_order), ("shuffled", shuffled)):
            for name, subject in (ours | plain).items():
                if isinstance(subject, Kdflow):
                    note(f"{test}, verified", name, copied(rows, subject.read_verified, order))
                    note(test, name, copied(rows, subject.read, order))
                else:
                    copied(rows, subject.read, order)  # into the page cache
                    note(test, name, copied(rows, subject.read, order))
        for name, subject in (ours | plain).items():
            drop_from_cache(folder / name)
            read = subject.read_ahead if isinstance(subject, Kdflow) else subject.read
            note("cold", name, copied(rows, read, in_order))
        drop_from_cache(folder / "raw")
        note("cold", "dd", dd(folder / "raw"))
    size = rows.bits_RH.nbytes / 1e6
    return {test: {k: size / s for k, s in best.items()} for test, best in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="by default a temporary one")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with work_folder(args.folder) as args.folder:
        run(args)


def run(args: argparse.Namespace) -> None:
    rows = Rows(int(args.gigabytes * 1e9), args.hidden)
    rates = measure(args.folder, rows, args.rounds)
    sizes = {
        codec: sum(p.stat().st_size for p in (args.folder / codec).rglob("hidden/c/*/0/0/0"))
        / len(rows.bits_RH)
        for codec in CODECS
    }
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("numpy", "zarr", "pyarrow")},
        "MB/s of rows": rates,
        "relative to memmap": {
            test: {k: v / rates[test.split(",")[0]]["memmap"] for k, v in best.items()}
            for test, best in rates.items()
        },
        "cold, relative to dd": {k: v / rates["cold"]["dd"] for k, v in rates["cold"].items()},
        "bytes per row": sizes,
    }
    print(json.dumps(result, indent=1))  # noqa: T201 - the result


if __name__ == "__main__":
    main()
