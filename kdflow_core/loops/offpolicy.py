"""Off-policy training: steps over a fixed set of examples, with checkpoints and metrics."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from configs.schema.run import StudentConfig
from kdflow_core.contracts import Examples, HiddenStateSource, MetricsSink, Reporter
from kdflow_core.student.checkpoint import load_newest, save_checkpoint
from kdflow_core.student.module import DistillationModule
from kdflow_core.student.optim import build_optimizer
from kdflow_core.student.plan import TrainingPlan, learning_rate
from kdflow_core.student.step import StepMetrics, training_step


def train_offpolicy(
    *,
    module: DistillationModule,
    plan: TrainingPlan,
    examples: Examples,
    states: Sequence[HiddenStateSource],
    config: StudentConfig,
    checkpoints: Path,
    metrics: MetricsSink,
    reporter: Reporter,
    device: torch.device,
) -> int:
    """Train to the end of the plan, from the newest checkpoint. Returns the step it began at."""
    rank = dist.get_rank()
    optimizer = build_optimizer(
        module, lr=config.lr, weight_decay=config.weight_decay, betas=config.adam_betas
    )
    first = load_newest(checkpoints, module, optimizer)
    reporter.message(
        f"training from step {first} of {plan.num_steps}"
        + (" (resumed from a checkpoint)" if first else "")
    )
    module.train()
    for step in range(first, plan.num_steps):
        started = time.perf_counter()
        lr = _set_learning_rate(optimizer, step, plan.num_steps, config)
        # Dropout, where a model has it, depends on step and rank alone: a resumed run repeats it.
        torch.manual_seed((plan.seed << 40) + (step << 16) + rank)
        batches = plan.step(step)
        for source in states:
            source.begin_step(step)
        result = training_step(
            module=module,
            optimizer=optimizer,
            batches=batches,
            examples=examples,
            states=states,
            rank=rank,
            max_grad_norm=config.max_grad_norm,
            device=device,
        )
        seconds = time.perf_counter() - started
        record = _record(step + 1, batches.epoch, lr, result, seconds)
        rate = batches.num_input_tokens / seconds
        record["tokens_per_s"] = rate
        metrics.write(record)
        if rank == 0:  # a step is one for all ranks
            reporter.progress(
                done=step + 1,
                total=plan.num_steps,
                unit="steps",
                detail=f"loss {result.loss:.4f}, kd {result.kd:.4f}, {rate:,.0f} tokens/s",
            )
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == plan.num_steps:
            save_checkpoint(checkpoints, step + 1, module, optimizer, keep=config.keep_checkpoints)
    return first


def _set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, num_steps: int, config: StudentConfig
) -> float:
    lr = learning_rate(
        step=step,
        num_steps=num_steps,
        peak=config.lr,
        warmup_fraction=config.warmup_fraction,
        min_ratio=config.min_lr_ratio,
    )
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def _record(
    step: int, epoch: float, lr: float, result: StepMetrics, seconds: float
) -> dict[str, float]:
    return {"step": step, "epoch": epoch, "lr": lr, **asdict(result), "seconds": seconds}
