"""The stage that runs the teacher."""

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict

import torch

from kdflow_core.contracts import OutputHead, TokenSequence
from kdflow_core.models.folders import context_length
from kdflow_core.models.heads import head_digest
from kdflow_core.models.loading import load_config
from kdflow_core.teacher.hf import TransformersTeacherEngine
from storage.artifact import ArtifactRef
from storage.hidden_states import HiddenStateWriter, StoredSequence, plan_layout
from storage.tokens import TokenTable
from tasks.adapters import TeacherSequences, bfloat16_bits
from tasks.wiring.stage_run import DTYPES, StageRun, default_device


def extract_states(stage: StageRun) -> ArtifactRef:
    """Run the teacher once over all sequences and stream its hidden states into the store."""
    tables = list(stage.tables().values())
    places, sequences = _planned_sequences(tables)
    config = load_config(stage.model_folder("teacher"))
    head = stage.teacher_head(torch.device("cpu"))
    layout = plan_layout(
        hidden_size=head.weight_VH.shape[1],
        num_rows=sum(s.num_rows for s in sequences),
        shard_rows=stage.run.storage.shard_rows,
        chunk_rows=stage.run.storage.chunk_rows,
    )
    stage.store.require_room(layout.num_bytes, f"the teacher's {layout.num_rows} hidden states")
    writer = HiddenStateWriter(
        store=stage.store,
        kind=stage.kind,
        digest=stage.digest,
        layout=layout,
        sequences=sequences,
    )
    if writer.num_committed:
        stage.reporter.message(
            f"{writer.num_committed} of {layout.num_shards} shards are there already; going on "
            f"with sequence {writer.next_sequence} of {len(sequences)}"
        )
    if writer.next_sequence < len(sequences):
        _run_teacher(stage, head, tables, places, writer)
    writer.close()
    return stage.commit(
        counts={"sequences": len(sequences), "rows": layout.num_rows},
        info={
            "layout": asdict(layout),
            "teacher": stage.spec.identity.inputs["teacher_model"],
            "architecture": (config.architectures or ["unknown"])[0],
            "engine": stage.run.teacher.type,
            "dtype": stage.run.teacher.dtype,
            "final_norm_applied": True,
            "head": {
                "digest": head_digest(head),
                "vocabulary": head.weight_VH.shape[0],
                "bias": head.bias_V is not None,
                "logit_scale": head.logit_scale,
                "softcap": head.softcap,
            },
            "codec": "raw bfloat16, crc32c",
            "meaning": "row i predicts token i+1",
        },
    )


def _planned_sequences(
    tables: list[TokenTable],
) -> tuple[list[tuple[int, int]], list[StoredSequence]]:
    """Every distinct teacher sequence once, in a fixed random order, and where it lies."""
    places: dict[bytes, tuple[int, int]] = {}
    counts: dict[bytes, int] = {}
    for number, table in enumerate(tables):
        supervised = table.supervised_counts("teacher")
        for index, key in enumerate(table.digests()):
            places.setdefault(key, (number, index))
            counts[key] = int(supervised[index])
    keys = sorted(places)  # digests are uniform: their order is a random permutation
    return [places[k] for k in keys], [StoredSequence(digest=k, num_rows=counts[k]) for k in keys]


def _run_teacher(
    stage: StageRun,
    head: OutputHead,
    tables: list[TokenTable],
    places: list[tuple[int, int]],
    writer: HiddenStateWriter,
) -> None:
    folder, teacher = stage.model_folder("teacher"), stage.run.teacher
    engine = TransformersTeacherEngine(
        folder=folder,
        head=head,
        dtype=DTYPES[teacher.dtype],
        attention=teacher.attention,
        tokens_per_batch=teacher.tokens_per_batch,
        max_length=context_length(folder),
        device=default_device(),
    )
    lengths = [table.lengths("teacher") for table in tables]
    waiting: deque[TokenSequence] = deque()
    remaining = places[writer.next_sequence :]

    def remember(sequences: TeacherSequences) -> Iterator[TokenSequence]:
        for sequence in sequences:
            waiting.append(sequence)
            yield sequence

    states = engine.hidden_states(remember(TeacherSequences(tables, remaining)))
    total = int(sum(lengths[t][i] for t, i in remaining))
    done = 0
    for (table, index), states_NH in zip(remaining, states, strict=True):
        writer.add(bfloat16_bits(states_NH), waiting.popleft().target_ids_N)
        done += int(lengths[table][index])
        stage.reporter.progress(done=done, total=total, unit="tokens")
    engine.close()
