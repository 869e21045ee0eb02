"""A teacher's pass over sequences: which there are, the engine, and the rows of each in order.

What the same teacher has read for other runs is copied from there. Dimensions: N rows of a
sequence, H hidden size.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from kdflow_core.contracts import OutputHead, TeacherEngine, TokenSequence
from kdflow_core.errors import DataError
from kdflow_core.teacher import build_engine
from kdflow_core.teacher.streaming import stream_states
from storage.states.layout import Sequences
from storage.tokens import TokenTable
from tasks.jobs import parts
from tasks.jobs.earlier_states import EarlierStates
from tasks.jobs.reference import Reference
from tasks.jobs.stage_run import StageRun
from tasks.jobs.stored import TeacherSequences, bfloat16_bits

WINDOW_BATCHES = 8
REFERENCE_CANDIDATES = 32  # sequences, of which the shortest are compared
Share = TypeVar("Share")


@dataclass(frozen=True, kw_only=True)
class TeacherWork:
    """What a teacher is to read: every distinct sequence of its view, in which table and row of it
    its ids lie, and its length.
    """

    tables: list[TokenTable]
    view: str
    table: np.ndarray
    row: np.ndarray
    lengths: np.ndarray
    sequences: Sequences

    def of(self, numbers: Sequence[int]) -> TeacherSequences:
        """Some sequences."""
        places = [(int(self.table[i]), int(self.row[i])) for i in numbers]
        return TeacherSequences(self.tables, places, self.view)


def distinct_sequences(
    tables: list[TokenTable], sources: Sequence[str] | None = None, view: str = "teacher"
) -> TeacherWork:
    """Every distinct sequence of a view once, of some data sources or of all, by digest: digests
    are uniform, so that this is a random order.

    Raises DataError when no sequence is of these sources.
    """
    digests = np.concatenate([table.digests(view) for table in tables])
    keys = digests.view(">u8")
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    first = np.ones(len(order), bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    chosen = order[first]
    known = [table.sources() for table in tables]
    names = tuple(sorted({name for _, own in known for name in own}))
    numbers = [np.array([names.index(n) for n in own], np.int16)[s] for s, own in known]
    source = np.concatenate(numbers)
    if sources is not None:
        chosen = chosen[np.isin(source[chosen], [i for i, n in enumerate(names) if n in sources])]
        if not len(chosen):
            raise DataError(f"no sample of the data sources {list(sources)} is left for a teacher")
    counts = [table.supervised_counts(view) for table in tables]
    return TeacherWork(
        tables=tables,
        view=view,
        table=np.repeat(np.arange(len(tables)), [len(t) for t in tables])[chosen],
        row=np.concatenate([np.arange(len(t)) for t in tables])[chosen],
        lengths=np.concatenate([table.lengths(view) for table in tables])[chosen],
        sequences=Sequences(
            digests=digests[chosen],
            num_rows=np.concatenate(counts)[chosen].astype(np.int32),
            source=source[chosen],
            source_names=names,
        ),
    )


def share_of(stage: StageRun, missing: Sequence[Share]) -> tuple[Sequence[Share], bool]:
    """What this rank's replica of the teacher does of what is missing; and whether this rank is the
    one of its replica that writes.
    """
    rank, size = parts.rank_and_size()
    width = stage.run.teacher.ranks_per_replica
    return missing[rank // width :: size // width], rank % width == 0


def engine_for(
    stage: StageRun,
    head: OutputHead,
    work: TeacherWork,
    earlier: EarlierStates,
    wanted: Sequence[int],
    first: Sequence[int],
) -> TeacherEngine | None:
    """The teacher, built by all ranks together, unless all `wanted` sequences are held already; its
    states of some of the `first` ones compared with those of transformers.
    """
    if earlier.held_N[wanted].all():
        return None
    rank, _ = parts.rank_and_size()
    teacher, reference = stage.run.teacher, None
    if rank < teacher.ranks_per_replica and teacher.type != "transformers":
        reference = Reference(stage, list(work.of(first[:REFERENCE_CANDIDATES])))
    if reference is not None and rank == 0:
        reference.compute()
    engine = build_engine(
        teacher,
        folder=stage.model_folder("teacher"),
        head=head,
        longest=int(work.lengths.max()),
        device=parts.device(stage),
    )
    if rank == 0 and engine.remark:
        stage.reporter.message(engine.remark)
    if reference is not None:
        reference.compare(engine)
    return engine


def rows_of(
    engine: TeacherEngine | None,
    earlier: EarlierStates,
    work: TeacherWork,
    numbers: Sequence[int],
    window_tokens: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows [N, H], in bits of bfloat16, and target ids [N] of sequences, copied or computed."""
    fresh = [number for number in numbers if not earlier.held_N[number]]
    computed = _computed(engine, work, fresh, window_tokens)
    for number in numbers:
        if earlier.held_N[number]:
            (sequence,) = work.of([number])
            yield earlier.rows(number, sequence), sequence.target_ids_N
        else:
            yield next(computed)


def _computed(
    engine: TeacherEngine | None, work: TeacherWork, numbers: Sequence[int], window_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same, from the teacher."""
    targets: deque[np.ndarray] = deque()

    def sequences() -> Iterator[TokenSequence]:
        for sequence in work.of(numbers):
            targets.append(sequence.target_ids_N)
            yield sequence

    if engine is not None:
        for states_NH in stream_states(engine, sequences(), window_tokens=window_tokens):
            yield bfloat16_bits(states_NH), targets.popleft()
