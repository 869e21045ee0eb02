"""A round's answers on disk: one Parquet file, for training and for people.

A row is one answer: the round, the training example whose prompt it answers (`prompt`) and its
source, ids of prompt and answer as the engine took and gave them, the log-probability of each
answer token when it was sampled (nats), why it ended, the version of the weights that wrote it, its
reward if there is one, and both texts, which nothing reads back.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import StoreCorruptError
from storage.store import disk_errors

ROLLOUTS_FILE = "rollouts.parquet"
SCHEMA = pa.schema(
    [
        ("round", pa.int32()),
        ("prompt", pa.int64()),
        ("source", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),
        ("log_probs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("version", pa.int32()),
        ("reward", pa.float64()),
        ("prompt_text", pa.string()),
        ("answer_text", pa.string()),
        ("label", pa.string()),
    ]
)


def write_rollouts(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows; their keys are those of SCHEMA."""
    path = folder / ROLLOUTS_FILE
    with disk_errors(str(path)):
        pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), path)


def join_rollouts(folder: Path, parts: Mapping[Path, Sequence[int]]) -> list[dict[str, Any]]:
    """Write the rows of several folders as one, in the order of the places that they have; the
    rows, as `read_rollouts` gives them.
    """
    table = pa.concat_tables([_table(part) for part in parts])
    places = list(itertools.chain.from_iterable(parts.values()))
    table = table.take(sorted(range(len(places)), key=places.__getitem__))
    path = folder / ROLLOUTS_FILE
    with disk_errors(str(path)):
        pq.write_table(table, path)
    return _rows(table)


def _table(folder: Path) -> pa.Table:
    path = folder / ROLLOUTS_FILE
    try:
        return pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise StoreCorruptError(f"{path} is not a Parquet file: {error}") from error


def read_rollouts(folder: Path) -> list[dict[str, Any]]:
    """All rows: numpy arrays for the lists. Raises StoreCorruptError for an unreadable file."""
    return _rows(_table(folder))


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    rows = [dict[str, Any]() for _ in range(table.num_rows)]
    for name in table.column_names:
        column = table.column(name)
        is_list = pa.types.is_list(column.type)
        for row, scalar in zip(rows, column, strict=True):
            row[name] = scalar.values.to_numpy() if is_list else scalar.as_py()
    return rows
