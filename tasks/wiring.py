"""The composition root: what each stage does, from config and references to an artifact.

The only module that sees both the core and the store. It runs inside worker processes and knows
nothing of Prefect.
"""

import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from configs.schema.models import GgufModel, LayerDropModel, PretrainedModel
from kdflow_core.contracts import OutputHead, Reporter, TokenSequence
from kdflow_core.data.rendering import Renderer
from kdflow_core.data.tokenization import Tally, tokenize
from kdflow_core.errors import ModelError
from kdflow_core.eval.distribution import score_distributions
from kdflow_core.eval.generation import exact_match, generate_greedily
from kdflow_core.loops.offpolicy import train_offpolicy
from kdflow_core.losses import build_divergence
from kdflow_core.losses.chunked import LossSpec
from kdflow_core.models.conversion import convert_gguf, drop_layers
from kdflow_core.models.folders import context_length, resolve_folder
from kdflow_core.models.heads import load_head
from kdflow_core.models.loading import (
    check_same_vocabulary,
    load_causal_lm,
    load_config,
    load_tokenizer,
    true_vocabulary_size,
)
from kdflow_core.student.checkpoint import completed_steps
from kdflow_core.student.export import export_student
from kdflow_core.student.module import DistillationModule, shard
from kdflow_core.student.plan import TrainingPlan
from kdflow_core.teacher.hf import TransformersTeacherEngine
from storage.artifact import ArtifactRef
from storage.hidden_states import HiddenStateReader, HiddenStateWriter, StoredSequence, plan_layout
from storage.store import ArtifactStore
from storage.tokens import TokenTable, TokenWriter
from tasks.adapters import StoredStates, TeacherSequences, TokenExamples, bfloat16_bits
from tasks.model_card import model_card
from tasks.report_page import write_report
from tasks.stages import StageSpec, gguf_path, open_store
from tasks.tracking import MetricsLog, NoMetrics

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPLITS = ("train", "heldout")


class StageRun:
    """A stage at work: its spec, store and reporter, and the commit at its end."""

    def __init__(self, spec: StageSpec, reporter: Reporter) -> None:
        self.spec = spec
        self.run = spec.run
        self.reporter = reporter
        self.store: ArtifactStore = open_store(spec.run)
        self.kind = spec.identity.kind
        self.digest = spec.identity.digest
        self._started = time.perf_counter()

    @property
    def workdir(self) -> Path:
        """The stage's local working folder; it survives a crash."""
        return self.store.workdir(self.kind, self.digest)

    def commit(self, *, counts: Mapping[str, int], info: Mapping[str, Any]) -> ArtifactRef:
        """Write the manifest."""
        return self.store.commit(
            kind=self.kind,
            digest=self.digest,
            code_version=self.spec.identity.code_version,
            config=self.spec.identity.config,
            inputs=self.spec.identity.inputs,
            counts=counts,
            info=info,
            seconds=time.perf_counter() - self._started,
        )

    def publish(self, *, counts: Mapping[str, int], info: Mapping[str, Any]) -> ArtifactRef:
        """Move the working folder's files into the artifact, then commit."""
        self.store.publish(self.kind, self.digest, self.workdir)
        return self.commit(counts=counts, info=info)

    def model_folder(self, side: str) -> Path:
        """The local folder of the teacher's or the (untrained) student's model."""
        prepared = self.spec.inputs.get(f"{side}_model")
        if prepared is not None:
            return self.store.local_copy(prepared)
        model = self.run.teacher.model if side == "teacher" else self.run.student.model
        assert isinstance(model, PretrainedModel)
        return resolve_folder(model.path, model.revision)

    def tables(self) -> dict[str, TokenTable]:
        """The token tables by split."""
        folder = self.store.local_copy(self.spec.inputs["tokens"])
        return {split: TokenTable(folder / f"{split}.arrow") for split in SPLITS}

    def states(self) -> StoredStates:
        """The teacher's stored states."""
        reader = HiddenStateReader(store=self.store, ref=self.spec.inputs["states"])
        return StoredStates(reader)

    def teacher_head(self) -> OutputHead:
        """The teacher's output head over the true vocabulary."""
        folder = self.model_folder("teacher")
        size = true_vocabulary_size(load_tokenizer(folder))
        return load_head(folder, load_config(folder), size)


def prepare_model(stage: StageRun) -> ArtifactRef:
    """A GGUF file converted, or the teacher with layers dropped."""
    teacher_side = stage.spec.identity.stage == "prepare-teacher"
    model = stage.run.teacher.model if teacher_side else stage.run.student.model
    target = stage.workdir
    if isinstance(model, GgufModel):
        path = gguf_path(model)
        actual = _sha256(path)
        if actual != model.sha256:
            raise ModelError(f"{path} has SHA-256 {actual}, the config pins {model.sha256}")
        stage.reporter.message(f"converting {path.name} to safetensors")
        convert_gguf(path, target, dtype=DTYPES[model.dtype])
    elif isinstance(model, LayerDropModel):
        stage.reporter.message(f"dropping layers {sorted(model.drop_layers)} of the teacher")
        drop_layers(stage.model_folder("teacher"), target, model.drop_layers)
    return stage.publish(counts={}, info={"model": model.model_dump(mode="json")})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenize_data(stage: StageRun) -> ArtifactRef:
    """Text to token ids, once for both models."""
    run, folder = stage.run, stage.workdir
    renderers, limits = {}, {}
    tokenizers = {}
    for side, template in (
        ("student", run.student.chat_template),
        ("teacher", run.teacher.chat_template),
    ):
        model_folder = stage.model_folder(side)
        tokenizers[side] = load_tokenizer(model_folder)
        limits[side] = context_length(model_folder)
        renderers[side] = Renderer(
            tokenizer=tokenizers[side],
            template=template.template,
            template_args=template.args,
            supervise=run.data.supervise,
        )
    check_same_vocabulary(tokenizers["student"], tokenizers["teacher"])
    limits["teacher"] = min(limits["teacher"], run.teacher.context_length or limits["teacher"])
    tally = Tally()
    examples = tokenize(
        config=run.data,
        seed=run.seed,
        student=renderers["student"],
        teacher=renderers["teacher"],
        max_student_length=limits["student"],
        max_teacher_length=limits["teacher"],
        reporter=stage.reporter,
        tally=tally,
    )
    with (
        TokenWriter(folder / "train.arrow") as train,
        TokenWriter(folder / "heldout.arrow") as heldout,
    ):
        writers = {"train": train, "heldout": heldout}
        for split, example in examples:
            writers[split].add(
                {
                    "source": example.source,
                    "digest": example.teacher.digest,
                    "student_ids": example.student.ids_T,
                    "student_supervised": example.student.supervised_T,
                    "teacher_ids": example.teacher.ids_T,
                    "teacher_supervised": example.teacher.supervised_T,
                    "answer": example.answer,
                }
            )
    counts = {}
    for split in SPLITS:
        table = TokenTable(folder / f"{split}.arrow")
        counts[f"{split}_sequences"] = len(table)
        counts[f"{split}_tokens"] = int(table.lengths("student").sum())
        counts[f"{split}_supervised_tokens"] = int(table.supervised_counts("student").sum())
    dropped = {source: dict(reasons) for source, reasons in tally.dropped.items()}
    stage.reporter.message(f"{counts['train_sequences']} training and "
                           f"{counts['heldout_sequences']} held-out samples; dropped: {dropped or 'none'}")
    return stage.publish(
        counts=counts,
        info={"read": dict(tally.read), "dropped": dropped, "first_dropped": tally.first_detail},
    )


def extract_states(stage: StageRun) -> ArtifactRef:
    """Run the teacher once over all sequences and stream its hidden states into the store."""
    tables = list(stage.tables().values())
    places, sequences = _planned_sequences(tables)
    config = load_config(stage.model_folder("teacher"))
    head = stage.teacher_head()
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
        max_length=min(context_length(folder), teacher.context_length or 2**31),
        device=default_device(),
    )
    lengths = [table.lengths("teacher") for table in tables]
    waiting: deque[TokenSequence] = deque()
    remaining = places[writer.next_sequence :]

    def remember(sequences: TeacherSequences) -> Any:
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


def train_student(stage: StageRun) -> ArtifactRef | None:
    """Distill; every rank runs this, rank 0 returns the artifact's reference."""
    run, config = stage.run, stage.run.student
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    device = default_device()
    table = stage.tables()["train"]
    student_folder = stage.model_folder("student")
    module = DistillationModule(
        model=load_causal_lm(student_folder, dtype=torch.float32, attention=config.attention),
        teacher_head=_to_device(stage.teacher_head(), device),
        spec=LossSpec(
            divergence=build_divergence(run.loss.divergence),
            kd_ratio=run.loss.kd_ratio,
            chunk_tokens=run.loss.chunk_tokens,
        ),
    )
    if config.activation_checkpointing:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh(device.type, (num_ranks,))
    shard(module, mesh=mesh, compute_dtype=DTYPES[config.compute_dtype])
    plan = TrainingPlan(
        lengths=table.lengths("student"),
        supervised_counts=table.supervised_counts("student"),
        global_batch_size=config.global_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        num_ranks=num_ranks,
        seed=run.seed,
        epochs=config.epochs,
        max_steps=config.max_steps,
    )
    checkpoints = stage.workdir / "checkpoints"
    output = stage.workdir / "artifact"
    metrics: MetricsLog | NoMetrics = NoMetrics()
    if rank == 0:
        first = max(completed_steps(checkpoints), default=0)
        metrics = MetricsLog(run=run, folder=output, first_step=first)
    train_offpolicy(
        module=module,
        plan=plan,
        examples=TokenExamples(table),
        states=stage.states(),
        config=config,
        kd_ratio=run.loss.kd_ratio,
        checkpoints=checkpoints,
        metrics=metrics,
        reporter=stage.reporter,
        device=device,
    )
    metrics.close()
    export_student(
        module,
        tokenizer=load_tokenizer(student_folder),
        dtype=DTYPES[config.save_dtype],
        model_card=model_card(stage.spec),
        target=output / "model",
    )
    if rank != 0:
        return None
    stage.store.publish(stage.kind, stage.digest, output)
    tokens = int(sum(plan.lengths[plan.sequences(s)].sum() for s in range(plan.num_steps)))
    ref = stage.commit(
        counts={"steps": plan.num_steps, "tokens": tokens}, info={"num_ranks": num_ranks}
    )
    shutil.rmtree(stage.workdir)  # the checkpoints have served
    return ref


def evaluate_student(stage: StageRun) -> ArtifactRef:
    """Held-out scores of the teacher and of the student before and after training."""
    run = stage.run
    device = default_device()
    examples = TokenExamples(stage.tables()["heldout"])
    states, head = stage.states(), _to_device(stage.teacher_head(), device)
    trained = stage.store.local_copy(stage.spec.inputs["student"]) / "model"
    folders = {
        "teacher": stage.model_folder("teacher"),
        "student before": stage.model_folder("student"),
        "student after": trained,
    }
    chosen = _generation_indices(examples, run.eval.max_generations)
    shown = [examples[i] for i in chosen]
    result: dict[str, Any] = {"models": {}, "samples": []}
    answers: dict[str, list[str]] = {}
    for label, folder in folders.items():
        is_teacher = label == "teacher"
        dtype = DTYPES[run.teacher.dtype if is_teacher else run.student.compute_dtype]
        attention = run.teacher.attention if is_teacher else run.student.attention
        model = load_causal_lm(folder, dtype=dtype, attention=attention).to(device)
        scores = score_distributions(
            model=model,
            examples=examples,
            states=states,
            teacher_head=head,
            tokens_per_batch=run.eval.tokens_per_batch,
            reporter=stage.reporter,
            label=label,
            side="teacher" if is_teacher else "student",
        )
        result["models"][label] = {name: asdict(score) for name, score in scores.items()}
        if shown:
            answers[label] = generate_greedily(
                model=model,
                tokenizer=load_tokenizer(folder),
                sequences=[e.teacher if is_teacher else e.student for e in shown],
                max_new_tokens=run.eval.max_new_tokens,
                reporter=stage.reporter,
                label=label,
            )
            golds, sources = [e.answer for e in shown], [e.source for e in shown]
            for name, share in exact_match(answers[label], golds, sources).items():
                result["models"][label].setdefault(name, {})["exact_match"] = share
        del model
    tokenizer = load_tokenizer(folders["teacher"])
    result["samples"] = [
        {
            "source": example.source,
            "prompt": tokenizer.decode(example.teacher.prompt_ids_T),
            "answer": example.answer,
            **{label: texts[number] for label, texts in answers.items()},
        }
        for number, example in enumerate(shown)
    ]
    path = stage.workdir / "evaluation.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    return stage.publish(
        counts={"heldout_sequences": len(examples), "generations": len(shown)}, info={}
    )


def _generation_indices(examples: TokenExamples, limit: int) -> list[int]:
    """Up to `limit` examples, spread evenly over the split."""
    count = min(limit, len(examples))
    return [int(i) for i in np.linspace(0, len(examples) - 1, count)] if count else []


def report(stage: StageRun) -> ArtifactRef:
    """The HTML report."""
    write_report(spec=stage.spec, store=stage.store, target=stage.workdir / "report.html")
    return stage.publish(counts={}, info={})


def default_device() -> torch.device:
    """This rank's accelerator, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("KDFLOW_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _to_device(head: OutputHead, device: torch.device) -> OutputHead:
    return OutputHead(
        weight_VH=head.weight_VH.to(device),
        bias_V=None if head.bias_V is None else head.bias_V.to(device),
        logit_scale=head.logit_scale,
        softcap=head.softcap,
    )


STAGES = {
    "prepare-teacher": prepare_model,
    "prepare-student": prepare_model,
    "tokenize": tokenize_data,
    "extract": extract_states,
    "train": train_student,
    "evaluate": evaluate_student,
    "report": report,
}
