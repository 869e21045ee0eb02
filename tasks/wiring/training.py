"""The stage that trains the student."""

import shutil
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from configs.schema.run import RunConfig
from configs.schema.teacher import InProcessTeacher
from kdflow_core.algorithms import build_algorithm
from kdflow_core.algorithms.base import Ingredients
from kdflow_core.contracts import OutputHead, TokenSequence
from kdflow_core.loops.trainer import Trainer
from kdflow_core.losses import build_divergence
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.surrogate import PolicyGradient
from kdflow_core.losses.token_weights import build_token_weight
from kdflow_core.losses.vocabulary import WholeVocabulary
from kdflow_core.models.loading import DTYPES, load_causal_lm, true_vocabulary_size
from kdflow_core.student.export import export_student
from kdflow_core.student.head_part import HeadPart, part_of, teacher_part
from kdflow_core.student.lora import add_adapters
from kdflow_core.student.module import DistillationModule, shard
from kdflow_core.student.plan import TrainingPlan
from kdflow_core.student.prefetch import PrefetchedStates
from kdflow_core.teacher import build_engine
from kdflow_core.teacher.live import LiveStates
from storage.artifact import ArtifactRef
from storage.tokens import TokenTable
from tasks.adapters import StoredStates, TokenExamples
from tasks.model_card import model_card
from tasks.tracking import MetricsLog, NoMetrics
from tasks.wiring.stage_run import StageRun, default_device

States = PrefetchedStates | LiveStates


def train_student(stage: StageRun) -> ArtifactRef | None:
    """Distill; every rank runs this, rank 0 returns the artifact's reference."""
    run, config = stage.run, stage.run.student
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    device = default_device()
    table = stage.tables()["train"]
    plan, states, heads = _plan_and_teachers(stage, table, device)
    module = build_module(stage, heads, device)
    checkpoints = stage.workdir / "checkpoints"
    output = stage.workdir / "artifact"
    trainer = Trainer(
        module=module,
        num_steps=plan.num_steps,
        seed=plan.seed,
        config=config,
        checkpoints=checkpoints,
        reporter=stage.reporter,
        device=device,
    )
    metrics: MetricsLog | NoMetrics = NoMetrics()
    if rank == 0:
        metrics = MetricsLog(run=run, folder=output, run_id=stage.digest, first_step=trainer.step)
    if trainer.step < plan.num_steps:
        trainer.run(
            plan.num_steps,
            batches_of=plan.step,
            examples=TokenExamples(table),
            states=states,
            metrics=metrics,
        )
        trainer.save()
        trainer.wait()
    metrics.close()
    for source in states:
        source.close()
    export_student(
        module,
        chat=stage.chat("student"),
        dtype=DTYPES[config.save_dtype],
        model_card=model_card(stage.spec),
        target=output / "model",
        lora=config.lora,
    )
    if rank != 0:
        return None
    files = stage.store.publish(stage.kind, stage.digest, output)
    tokens = int(sum(plan.lengths[plan.sequences(s)].sum() for s in range(plan.num_steps)))
    ref = stage.commit(
        files=files,
        counts={"steps": plan.num_steps, "tokens": tokens},
        info={"num_ranks": num_ranks},
    )
    shutil.rmtree(stage.workdir)  # the checkpoints have served
    return ref


def _plan_and_teachers(
    stage: StageRun, table: TokenTable, device: torch.device
) -> tuple[TrainingPlan, Sequence[States], Mapping[str, OutputHead]]:
    """The steps; the states of every teacher that is asked, stored or from an engine in these
    ranks; and the teachers' heads by name.
    """
    run = stage.run
    if not run.algorithm.TEACHER_STATES:
        return training_plan(stage, table, groups=None), (), {}
    if run.source == "live":
        plan = training_plan(stage, table, groups=None)
        live, head = _live_states(stage, table, plan, device)
        return plan, (live,), {"teacher": head}
    signals = {name: stage.of_teacher(name).teacher_signal(device) for name in run.teacher_names}
    windowed = run.student.shuffle_window_shards is not None
    first, _ = next(iter(signals.values()))
    groups = first.shard_of(table.digests()) if windowed else None
    plan = training_plan(stage, table, groups=groups)
    examples = TokenExamples(table)
    prefetched = [
        _prefetched(stored, plan, examples, run.sources_of(name))
        for name, (stored, _) in signals.items()
    ]
    return plan, prefetched, {name: head for name, (_, head) in signals.items()}


def _prefetched(
    stored: StoredStates,
    plan: TrainingPlan,
    examples: TokenExamples,
    sources: frozenset[str] | None,
) -> PrefetchedStates:
    rank = dist.get_rank()
    return PrefetchedStates(
        stored,
        sequences_of=lambda step: _teacher_sequences(plan, examples, step, rank, sources),
        num_steps=plan.num_steps,
    )


def _teacher_sequences(
    plan: TrainingPlan,
    examples: TokenExamples,
    step: int,
    rank: int,
    sources: frozenset[str] | None = None,
) -> list[TokenSequence]:
    """What a teacher of some data sources (None: of all) saw of a rank's part of a step."""
    batches = plan.step(step).micro_batches[rank]
    chosen = [examples[i] for batch in batches for i in batch]
    return [e.teacher for e in chosen if sources is None or e.source in sources]


def _live_states(
    stage: StageRun, table: TokenTable, plan: TrainingPlan, device: torch.device
) -> tuple[LiveStates, OutputHead]:
    """A teacher in these ranks."""
    teacher, rank = stage.run.teacher, dist.get_rank()
    assert isinstance(teacher, InProcessTeacher)  # RunConfig refuses others for a live run
    head = stage.teacher_head(device)
    engine = build_engine(
        teacher,
        folder=stage.model_folder("teacher"),
        head=head,
        longest=int(table.lengths("teacher").max()),
        device=device,
    )
    width = teacher.ranks_per_replica
    first = rank // width * width
    examples = TokenExamples(table)
    states = LiveStates(
        engine=engine,
        hidden_size=head.weight_VH.shape[1],
        sequences_of=lambda step, rank: _teacher_sequences(plan, examples, step, rank),
        rank=rank,
        ranks=range(first, first + width),
        num_steps=plan.num_steps,
        steps_at_once=teacher.forward_batches or 1,
        sleep=teacher.sleep,
    )
    return states, head


def build_module(
    stage: StageRun, heads: Mapping[str, OutputHead], device: torch.device
) -> DistillationModule:
    """The student with its algorithm, sharded over all ranks."""
    config = stage.run.student
    model = load_causal_lm(
        stage.model_folder("student"),
        dtype=torch.float32,
        attention=config.attention,
        trust_remote_code=stage.trusts("student"),
    )
    if config.lora is not None:
        torch.manual_seed(
            stage.run.seed
        )  # the adapters' first weights are random, on all ranks alike
        add_adapters(model, config.lora)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    vocabulary_size = true_vocabulary_size(stage.tokenizer("student"))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    compute_dtype = DTYPES[config.compute_dtype]
    part = None
    if config.vocabulary_parallel:
        part = part_of(
            model, vocabulary_size=vocabulary_size, mesh=mesh, compute_dtype=compute_dtype
        )
        heads = {name: teacher_part(head, part) for name, head in heads.items()}
    ingredients = Ingredients(
        spec=loss_spec(stage.run, part),
        model=model,
        heads=heads,
        vocabulary_size=vocabulary_size,
    )
    module = DistillationModule(
        model=model,
        algorithm=build_algorithm(stage.run.algorithm, ingredients),
        vocabulary_size=vocabulary_size,
        head_part=part,
    )
    shard(module, mesh=mesh, compute_dtype=compute_dtype)
    return module


def loss_spec(run: RunConfig, part: HeadPart | None) -> LossSpec:
    """The run's loss, over the whole vocabulary or this rank's part of it."""
    loss, gradient = run.loss, None
    if run.on_policy is not None and run.on_policy.reward is not None:
        reward = run.on_policy.reward
        gradient = PolicyGradient(
            weight=reward.weight, clip_low=reward.clip_low, clip_high=reward.clip_high
        )
    return LossSpec(
        divergence=build_divergence(loss.divergence),
        kd_ratio=loss.kd_ratio,
        logits_bytes=loss.logits_memory_mb * 10**6,
        token_weight=build_token_weight(loss.token_weight),
        policy_gradient=gradient,
        vocabulary=WholeVocabulary() if part is None else part.vocabulary,
    )


def training_plan(stage: StageRun, table: TokenTable, groups: np.ndarray | None) -> TrainingPlan:
    """The steps of the run; `groups` are the shards of the sequences' stored states."""
    config = stage.run.student
    return TrainingPlan(
        lengths=table.lengths("student"),
        supervised_counts=table.supervised_counts("student"),
        global_batch_size=config.global_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        num_ranks=dist.get_world_size(),
        seed=stage.run.seed,
        epochs=config.epochs,
        max_steps=config.max_steps,
        groups=groups,
        window=config.shuffle_window_shards,
    )
