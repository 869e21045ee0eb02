"""The stage that runs the teacher.

Ranks share the work by whole shards: each replica of the teacher takes its share of the missing
ones, and the replica's first rank writes them. What the same teacher has read for other runs is
copied from there.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from kdflow_core.bounded import BoundedWorker
from kdflow_core.contracts import OutputHead, TeacherEngine, TokenSequence
from kdflow_core.errors import DataError
from kdflow_core.models.heads import head_digest
from kdflow_core.models.loading import load_config
from kdflow_core.teacher import build_engine, longest_allowed
from kdflow_core.teacher.codec_loss import codec_loss, compare_states
from kdflow_core.teacher.streaming import check_lengths, stream_states
from kdflow_core.workers.devices import barrier
from storage.artifact import ArtifactRef
from storage.states.layout import Layout, Sequences, plan_layout
from storage.states.writer import HiddenStateWriter
from storage.tokens import TokenTable
from tasks.jobs import parts
from tasks.jobs.earlier_states import EarlierStates, earlier_states
from tasks.jobs.reference import Reference
from tasks.jobs.stage_run import StageRun, job
from tasks.jobs.stored import TeacherSequences, bfloat16_bits, bfloat16_tensor
from tasks.stages.slices import state_splits

WINDOW_BATCHES = 8
SHARDS_BEHIND = 2
REFERENCE_CANDIDATES = 32  # sequences, of which the shortest are compared


@dataclass(frozen=True, kw_only=True)
class TeacherWork:
    """What is to be stored: every distinct sequence of a teacher's view, in which table and row of
    it its ids lie, and its length.
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


@job("extract")
def extract_states(stage: StageRun) -> ArtifactRef | None:
    """Run the teacher once over all sequences and stream its hidden states into the store.

    Every rank runs this, rank 0 returns the artifact's reference. Of a portion, only every
    `portion.of`-th shard is written.
    """
    parts.join(stage)
    rank, _ = parts.rank_and_size()
    tables = stage.tables()
    splits = [tables[split] for split in state_splits(stage.run)]
    of = stage.spec.identity.config
    work = distinct_sequences(splits, of.get("sources"), of.get("view", "teacher"))
    folder = stage.model_folder("teacher")
    check_lengths(int(work.lengths.max()), longest_allowed(stage.run.teacher, folder))
    head = parts.teacher_head(stage, torch.device("cpu"))
    heads_digest = head_digest(head) if rank == 0 else ""  # of gigabytes, asked for by the first
    storage = stage.run.storage
    layout = plan_layout(
        hidden_size=head.weight_VH.shape[1],
        num_rows=work.sequences.num_rows,
        shard_rows=storage.shard_rows,
        chunk_rows=storage.chunk_rows,
        codec=storage.codec,
    )
    if rank == 0 and storage.check_room:
        _require_room(stage, layout)
    writer = HiddenStateWriter(
        store=stage.store,
        kind=stage.kind,
        digest=stage.digest,
        layout=layout,
        sequences=work.sequences,
    )
    missing = writer.missing_shards()
    barrier()  # every rank has seen the same shards before one of them writes
    if len(missing) < layout.num_shards:
        stage.reporter.message(
            f"{layout.num_shards - len(missing)} of {layout.num_shards} shards are there already"
        )
    portion = stage.spec.portion
    if portion is not None:
        missing = [k for k in missing if k % portion.of == portion.number]
    if missing:
        earlier = earlier_states(stage, heads_digest, work.sequences.digests)
        _run_teacher(stage, head, work, writer, missing, earlier)
    barrier()
    if rank != 0 or portion is not None:
        return None
    files, measured = writer.close()
    info = _info(stage, head, heads_digest, layout)
    if measured:
        info["codec_loss"] = codec_loss(measured)
        _tell_loss(stage, info["codec_loss"])
    return stage.commit(
        files=files,
        counts={
            "sequences": len(work.sequences),
            "tokens": int(work.lengths.sum()),
            "rows": layout.num_rows,
        },
        info=info,
    )


def _require_room(stage: StageRun, layout: Layout) -> None:
    """Refuse what will not fit the disk, before the teacher runs. Raises StoreFullError."""
    there = sum(stage.store.sizes(stage.store.folder(stage.kind, stage.digest)).values())
    what = f"the missing part of the teacher's {layout.num_rows:,} hidden states"
    stage.store.require_room(layout.num_bytes - there, what)


def _tell_loss(stage: StageRun, loss: dict[str, float]) -> None:
    stage.reporter.message(
        f"codec {stage.run.storage.codec}: KL of stored from exact distributions "
        f"{loss['kl_mean']:.1e} nats on average, {loss['kl_max']:.1e} at most, same top-1 "
        f"{loss['same_top1']:.1%} ({loss['rows']:.0f} rows compared)"
    )


def _info(stage: StageRun, head: OutputHead, heads_digest: str, layout: Layout) -> dict[str, Any]:
    """What a reader of the states must check or wants to know."""
    folder, trust = stage.model_folder("teacher"), stage.trusts("teacher")
    config = load_config(folder, trust_remote_code=trust)
    tokens = stage.spec.inputs["tokens"]
    tokenized = stage.store.manifest(tokens.kind, tokens.digest)
    return {
        "layout": asdict(layout),
        "teacher": {
            "model": stage.run.teacher.model.model_dump(mode="json"),
            "digest": stage.spec.identity.inputs["teacher_model"],
            "tokenizer": tokenized.inputs["teacher_tokenizer"],
            "template": tokenized.config["teacher_template"],
        },
        "architecture": (config.architectures or ["unknown"])[0],
        "engine": stage.run.teacher.type,
        "dtype": stage.run.teacher.dtype,
        "final_norm_applied": True,
        "head": {
            "digest": heads_digest,
            "vocabulary": head.weight_VH.shape[0],
            "bias": head.bias_V is not None,
            "logit_scale": head.logit_scale,
            "softcap": head.softcap,
        },
        "meaning": "row i predicts token i+1",
    }


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


def _reference(
    stage: StageRun, work: TeacherWork, writer: HiddenStateWriter, missing: list[int]
) -> Reference | None:
    """What the first states are compared with; nothing where transformers itself is the teacher."""
    if stage.run.teacher.type == "transformers":
        return None
    first = list(writer.sequences_of(missing[0]))[:REFERENCE_CANDIDATES]
    return Reference(stage, list(work.of(first)))


def _checked_engine(
    stage: StageRun, head: OutputHead, longest: int, reference: Reference | None
) -> TeacherEngine:
    """The teacher, its first states compared with those of transformers."""
    rank, _ = parts.rank_and_size()
    if reference is not None and rank == 0:
        reference.compute()
    engine = build_engine(
        stage.run.teacher,
        folder=stage.model_folder("teacher"),
        head=head,
        longest=longest,
        device=parts.device(stage),
    )
    if rank == 0 and engine.remark:
        stage.reporter.message(engine.remark)
    if reference is not None:
        reference.compare(engine)
    return engine


def _run_teacher(
    stage: StageRun,
    head: OutputHead,
    work: TeacherWork,
    writer: HiddenStateWriter,
    missing: list[int],
    earlier: EarlierStates,
) -> None:
    teacher = stage.run.teacher
    rank, size = parts.rank_and_size()
    replica, place_in_replica = divmod(rank, teacher.ranks_per_replica)
    shards = missing[replica :: size // teacher.ranks_per_replica]
    wanted = [number for shard in missing for number in writer.sequences_of(shard)]
    held = int(earlier.held_N[wanted].sum())
    if rank == 0 and held:
        stage.reporter.message(
            f"the states of {held} of {len(wanted)} sequences are copied: this teacher has read "
            "them for other runs"
        )
    engine = None
    if held < len(wanted):  # on any rank: they build it together
        reference = _reference(stage, work, writer, missing) if replica == 0 else None
        engine = _checked_engine(stage, head, int(work.lengths.max()), reference)
    numbers = [number for shard in shards for number in writer.sequences_of(shard)]
    total, done = int(work.lengths[numbers].sum()), 0

    def measure(exact_NH: np.ndarray, stored_NH: np.ndarray) -> dict[str, float]:
        return compare_states(head, bfloat16_tensor(exact_NH), bfloat16_tensor(stored_NH))

    window = WINDOW_BATCHES * teacher.tokens_per_batch
    with BoundedWorker(SHARDS_BEHIND) as background:
        for shard in shards:
            # A shard has batches of its own: what they are does not depend on which shards were
            # there already, nor on who computes the others, and states of a batch depend on it.
            rows: list[np.ndarray] = []
            targets: list[np.ndarray] = []
            sequences: Sequence[int] = writer.sequences_of(shard)
            if place_in_replica:  # what is copied is the writer's
                sequences = [number for number in sequences if not earlier.held_N[number]]
            made = _rows(engine, earlier, work, sequences, window)
            for number, (rows_NH, targets_N) in zip(sequences, made, strict=True):
                rows.append(rows_NH)
                targets.append(targets_N)
                done += int(work.lengths[number])
                if place_in_replica == 0:
                    stage.reporter.progress(done=done, total=total, unit="tokens")
            if place_in_replica == 0:
                background.submit(partial(writer.write_shard, shard, rows, targets, measure))
    if engine is not None:
        engine.close()


def _rows(
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
