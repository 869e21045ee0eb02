"""Opening a store of many sequences: seconds and memory, in a process of its own.

`python -m tests.benchmarks.index FOLDER --sequences 10000000`. The index is as of a store with that
many sequences; of the rows there is one small shard, which is what opening reads.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil

from storage.artifact import ArtifactRef
from storage.states.files import INDEX, record
from storage.states.layout import Sequences, plan_layout
from storage.states.reader import HiddenStateReader
from storage.states.writer import HiddenStateWriter
from storage.store import ArtifactStore
from tests.benchmarks.subjects import work_folder

DIGEST = "0" * 32
LOOKUPS = 1_000_000


def store_in(folder: Path) -> ArtifactStore:
    return ArtifactStore(root=str(folder), scratch=str(folder / "scratch"))


def digests_of(count: int) -> np.ndarray:
    """Random ones in order: uint8 [count, 16]."""
    halves = np.sort(np.random.default_rng(0).integers(0, 2**63, count, np.int64))
    return np.stack([halves, halves], axis=1).astype(">u8").view(np.uint8).reshape(-1, 16)


def write(folder: Path, count: int) -> int:
    """An artifact whose index has `count` sequences of 500 rows; its size in bytes."""
    rng = np.random.default_rng(1)
    sequences = Sequences(
        digests=digests_of(count),
        num_rows=np.full(count, 500, np.int32),
        source=np.zeros(count, np.int16),
        source_names=("random",),
    )
    layout = plan_layout(
        hidden_size=2048,
        num_rows=sequences.num_rows,
        shard_rows=None,
        chunk_rows=None,
        codec="raw",
    )
    store = store_in(folder)
    writer = HiddenStateWriter(
        store=store, kind="states", digest=DIGEST, layout=layout, sequences=sequences
    )
    content = writer.index(rng.integers(0, 2**63, count).astype(np.uint64))
    store.write_whole(f"{store.folder('states', DIGEST)}/{INDEX}", content)
    store.commit(
        kind="states",
        digest=DIGEST,
        code_version=1,
        config={},
        inputs={},
        files=[record(INDEX, content)],
        counts={},
        info={"layout": asdict(layout)},
        seconds=0.0,
    )
    return len(content)


def measure(folder: Path) -> None:
    """Open, find the shards of some sequences, and print what that took."""
    store = store_in(folder)
    ref: ArtifactRef = store.ref(store.manifest("states", DIGEST))
    process = psutil.Process()
    before = process.memory_info()
    begin = time.perf_counter()
    reader = HiddenStateReader(store=store, ref=ref)
    opened = time.perf_counter() - begin
    after = process.memory_info()
    wanted = np.random.default_rng(2).permutation(digests_of(len(reader)))[:LOOKUPS]
    begin = time.perf_counter()
    reader.shard_of(wanted)
    looked_up = time.perf_counter() - begin
    result = {
        "seconds to open": opened,
        "private MB": ((after.rss - after.shared) - (before.rss - before.shared)) / 1e6,
        "mapped MB": (after.shared - before.shared) / 1e6,
        f"seconds to find the shards of {LOOKUPS:,}": looked_up,
    }
    print(json.dumps(result))  # noqa: T201 - the result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="by default a temporary one")
    parser.add_argument("--sequences", type=int, default=10_000_000)
    parser.add_argument("--measure", action="store_true", help="only open what is there")
    args = parser.parse_args()
    with work_folder(args.folder) as args.folder:
        run(args)


def run(args: argparse.Namespace) -> None:
    if args.measure:
        measure(args.folder)
        return
    num_bytes = write(args.folder, args.sequences)
    print(json.dumps({"bytes a sequence": num_bytes / args.sequences}))  # noqa: T201 - the result
    command = [sys.executable, "-m", "tests.benchmarks.index", str(args.folder), "--measure"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
