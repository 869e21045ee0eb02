"""Off-policy steps: ours by replay and live, TRL's GKD, and two plain loops, on the same sequences.

`python -m tests.benchmarks.offpolicy`. Forward KL alone, AdamW at a constant rate, one rank, the
same sequences in every step. Each subject has a process of its own, in turn, `--turns` times. The
plain loop is a first draft: padded batches, all logits, two models. The tuned one is what an expert
makes of it in twenty lines: batches of similar lengths, logits of supervised rows alone, fused
AdamW, buffers kept. A subject counts only where its losses are those of the first one.

Prints medians over steps without the first, which allocates, and times relative to ours by replay
(above 1: ours is faster), with the range over turns.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from importlib import metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.load import validate_run
from configs.schema.run import RunConfig
from kdflow_core.allocator import keep_large_blocks
from kdflow_core.batching import Division
from kdflow_core.student.schedule import BatchSchedule
from storage.tokens import TokenTable
from tasks.jobs.stored import TokenExamples
from tasks.presentation.tracking import METRICS_FILE, read_metrics
from tasks.stages.identity import open_store
from tasks.stages.planning import plan_stages
from tests.benchmarks.peaks import watched_peaks
from tests.benchmarks.subjects import distillation, quickstart_model, save_untrained
from tests.conftest import run_inline
from tests.real_tokenizers import real_tokenizer

PACKAGES = ("torch", "transformers", "trl")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LR, CLIP = 1e-5, 1.0
TOLERANCE = 0.02  # of the loss, relative: other orders of sums, and bfloat16 elsewhere
Loop = Callable[["Work"], list[float]]


def random_models(folder: Path) -> tuple[Path, Path]:
    """A teacher and a student with Qwen's 152k tokens and the quick start's width, untrained."""
    tokenizer = real_tokenizer("qwen")
    tokenizer.chat_template = TEMPLATE
    made = []
    for name, layers in (("teacher", 12), ("student", 6)):
        save_untrained(
            folder / name,
            tokenizer,
            vocabulary=151_936,
            layers=layers,
            width=576,
            key_value_heads=3,
        )
        made.append(folder / name)
    return made[0], made[1]


def write_data(path: Path, count: int, lengths: tuple[int, int]) -> None:
    """Questions with answers of random lengths, in words: Python's own documentation."""
    rng = random.Random(0)
    words = " ".join(topics.values()).split()
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            size, begin = rng.randint(*lengths), rng.randrange(len(words) - lengths[1])
            answer = " ".join(words[begin : begin + size])
            messages = [
                {"role": "user", "content": f"Part {number}."},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def recipe(args: argparse.Namespace, folder: Path) -> RunConfig:
    tree = distillation(
        folder,
        teacher=args.teacher,
        student=args.student,
        dtype=args.dtype,
        tokens_per_pass=args.micro_batch_tokens,
    )
    tree["student"] |= {
        "float32_residual": args.float32_residual,
        "lr": LR,
        "min_lr_ratio": 1.0,
        "warmup_fraction": 0.0,
        "adam_betas": (0.9, 0.999),
        "max_grad_norm": CLIP,
        "max_steps": args.steps,
        "global_batch_size": args.sequences,
        "checkpoint_every": 10**6,
    }
    return validate_run(tree | {"name": "benchmark"})


class Work:
    """What the loops share: both models' folders, and the sequences of every step."""

    def __init__(self, args: argparse.Namespace, folder: Path, tokens: Path) -> None:
        self.args = args
        self.dtype = getattr(torch, args.dtype)
        table = TokenTable(tokens / "train.arrow")
        schedule = BatchSchedule(
            lengths=table.lengths("student"),
            supervised_counts=table.supervised_counts("student"),
            global_batch_size=args.sequences,
            division=Division(tokens=args.micro_batch_tokens),
            num_ranks=1,
            seed=0,
            epochs=None,
            max_steps=args.steps,
        )
        examples = TokenExamples(table)
        self.steps = [
            [examples[i].student for i in schedule.sequences(step)] for step in range(args.steps)
        ]
        self.times: list[float] = []

    def models(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Teacher and student; the student's weights are float32."""
        load = AutoModelForCausalLM.from_pretrained
        teacher = load(self.args.teacher, dtype=self.dtype)
        return teacher.eval(), load(self.args.student, dtype=torch.float32).train()

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast("cpu", self.dtype)


def padded(sequences: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, T], and which positions predict a supervised token."""
    width = max(len(s.ids_T) for s in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    rows = torch.zeros(len(sequences), width, dtype=torch.bool)
    for number, sequence in enumerate(sequences):
        ids[number, : len(sequence.ids_T)] = torch.from_numpy(sequence.ids_T.astype(np.int64))
        rows[number, sequence.target_positions_N - 1] = True
    return ids, rows


def cut(sequences: Sequence[Any], budget: int) -> list[list[Any]]:
    """Batches of sequences in their order, under a limit of padded tokens."""
    batches: list[list[Any]] = []
    for sequence in sequences:
        following = [*batches[-1], sequence] if batches else []
        if following and len(following) * max(len(s.ids_T) for s in following) <= budget:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return batches


def train(
    work: Work,
    kl: Callable[[PreTrainedModel, PreTrainedModel, Sequence[Any]], torch.Tensor],
    *,
    by_length: bool,
    fused: bool,
) -> list[float]:
    """The losses of all steps; `kl` is the sum over the supervised tokens of a batch."""
    teacher, student = work.models()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.0, fused=fused)
    losses = []
    for sequences in work.steps:
        begin, total = time.perf_counter(), 0.0
        count = sum(len(s.target_positions_N) for s in sequences)
        ordered = sorted(sequences, key=lambda s: -len(s.ids_T)) if by_length else sequences
        for batch in cut(ordered, work.args.micro_batch_tokens):
            loss = kl(teacher, student, batch) / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        work.times.append(time.perf_counter() - begin)
    return losses


def plain_loop(work: Work) -> list[float]:
    """Batches as they come; all logits of both models."""

    def kl(teacher: PreTrainedModel, student: PreTrainedModel, batch: Sequence[Any]) -> Any:
        ids, rows = padded(batch)
        with torch.no_grad():
            p = teacher(ids).logits.float().log_softmax(-1)
        with work.autocast():
            logits = student(ids).logits
        q = logits.float().log_softmax(-1)
        return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)[rows].sum()

    return train(work, kl, by_length=False, fused=False)


def tuned_loop(work: Work) -> list[float]:
    """Sorted by length; states first, then logits of supervised rows alone; fused AdamW."""

    def kl(teacher: PreTrainedModel, student: PreTrainedModel, batch: Sequence[Any]) -> Any:
        ids, rows = padded(batch)
        with torch.no_grad():
            p = teacher.lm_head(teacher.model(ids).last_hidden_state[rows]).float()
            p = p.log_softmax(-1)
        with work.autocast():
            q = student.lm_head(student.model(ids).last_hidden_state[rows])
        return F.kl_div(q.float().log_softmax(-1), p, log_target=True, reduction="sum")

    return train(work, kl, by_length=True, fused=True)


def trl_loop(work: Work) -> list[float]:
    """TRL's GKD trainer on given answers."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = AutoTokenizer.from_pretrained(work.args.student)
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for sequence in (s for step in work.steps for s in step):
        supervised = sequence.supervised_T
        rows["input_ids"].append(sequence.ids_T.tolist())
        rows["labels"].append(np.where(supervised, sequence.ids_T, -100).tolist())
    begins: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            begins.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            work.times.append(time.perf_counter() - begins[-1])

    class Trainer(GKDTrainer):
        """On the sequences in their order, as they are tokenized."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(f["input_ids"]) for f in features)

        def filled(name: str, value: int) -> torch.Tensor:
            return torch.tensor([f[name] + [value] * (width - len(f[name])) for f in features])

        ids, labels = filled("input_ids", 0), filled("labels", -100)
        mask = torch.tensor(
            [[k < len(f["input_ids"]) for k in range(width)] for f in features]
        ).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "prompts": ids[:, :1]}

    teacher, student = work.models()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=student,
            teacher_model=teacher,
            args=GKDConfig(
                output_dir=folder,
                lmbda=0.0,
                beta=0.0,
                temperature=1.0,
                per_device_train_batch_size=work.args.trl_batch,
                gradient_accumulation_steps=work.args.sequences // work.args.trl_batch,
                max_steps=work.args.steps,
                learning_rate=LR,
                lr_scheduler_type="constant",
                max_grad_norm=CLIP,
                gradient_checkpointing=False,
                bf16=work.dtype == torch.bfloat16,
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=Dataset.from_dict(rows),
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        with redirect_stdout(sys.stderr):  # it prints what it logs
            trainer.train()
        return [float(e["loss"]) for e in trainer.state.log_history if "loss" in e]


LOOPS: dict[str, Loop] = {"plain loop": plain_loop, "tuned loop": tuned_loop, "trl": trl_loop}
SUBJECTS = ["kdflow replay", "kdflow live", *LOOPS]


def measured(target: Callable[..., None], *args: Any) -> dict[str, Any]:
    """What a new process sends back, and the most memory of it or of a process below it."""
    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(there, *args))
    process.start()
    there.close()
    with watched_peaks() as peaks:
        found: dict[str, Any] = here.recv()
        process.join()
    return found | {"peak_mb": max(peaks.values(), default=0) / 1e6}


def run_loop(answer: Connection, name: str, args: argparse.Namespace, *places: Path) -> None:
    keep_large_blocks()  # as ours does; it helps the plain loops and TRL, too
    work = Work(args, *places)
    losses = LOOPS[name](work)
    answer.send({"losses": losses, "seconds": work.times})


def run_ours(answer: Connection, run: RunConfig) -> None:
    """The training stage in a rank of its own; what comes before is there."""
    identity = plan_stages(run)["train"]
    done = run_inline(run, until="train", launched=["train"])
    records = read_metrics(Path(done["student"].uri) / METRICS_FILE)
    open_store(run).retract(identity.kind, identity.digest)  # the next turn trains it again
    answer.send(
        {
            "losses": [record["loss"] for record in records],
            "seconds": [record["seconds"] for record in records],
        }
    )


def prepared(args: argparse.Namespace, folder: Path) -> tuple[dict[str, RunConfig], Path]:
    """Our runs, their tokens and states stored; and where the tokens are."""
    write_data(folder / "data.jsonl", 2 * args.sequences * args.steps, tuple(args.words))
    replay = recipe(args, folder)
    live = replay.model_copy(update={"delivery": "live"})
    for run in (replay, live):
        done = run_inline(run, until="extract")
    return {"kdflow replay": replay, "kdflow live": live}, Path(done["tokens"].uri)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, help="by default the quick start's")
    parser.add_argument("--student", type=Path, help="by default the quick start's")
    parser.add_argument("--large", action="store_true", help="untrained models with 152k tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--float32-residual", action="store_true", help="ours, beside bfloat16")
    parser.add_argument("--sequences", type=int, default=4, help="of a step")
    parser.add_argument("--words", type=int, nargs=2, default=(30, 450), help="of an answer")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--trl-batch", type=int, default=2, help="sequences of TRL's forward pass")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=SUBJECTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.large:
            args.teacher, args.student = random_models(folder)
        args.teacher = args.teacher or quickstart_model("teacher")
        args.student = args.student or quickstart_model("student")
        runs, tokens = prepared(args, folder)
        turns: dict[str, list[dict[str, Any]]] = {subject: [] for subject in args.subjects}
        for _ in range(args.turns):
            for subject, found in turns.items():
                if subject in runs:
                    found.append(measured(run_ours, runs[subject]))
                else:
                    found.append(measured(run_loop, subject, args, folder, tokens))
    result = {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "machine": {"processor": platform.processor(), "cores": torch.get_num_threads()},
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "subjects": summary(turns),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


def summary(turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By subject: the median step, that of every turn over ours by replay in the same turn, the
    peak, and how far its losses are from those of the first subject.
    """
    first = next(iter(turns))
    base = [statistics.median(turn["seconds"][1:]) for turn in turns[first]]
    reference = np.array(turns[first][0]["losses"])
    found = {}
    for subject, own in turns.items():
        medians = [statistics.median(turn["seconds"][1:]) for turn in own]
        ratios = [mine / other for mine, other in zip(medians, base, strict=True)]
        losses = np.array(own[0]["losses"])
        difference = float(np.abs(losses / reference - 1).max())
        found[subject] = {
            "seconds": statistics.median(medians),
            f"over {first}": [statistics.median(ratios), min(ratios), max(ratios)],
            "peak_mb": max(turn["peak_mb"] for turn in own),
            "losses differ by": difference,
            "counts": difference < TOLERANCE,
        }
    return found


if __name__ == "__main__":
    main()
