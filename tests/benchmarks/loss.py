"""Time and memory of the chunked loss against the bare products, full logits, TRL and Liger-Kernel.

`python -m tests.benchmarks.loss --tokens 4096 --vocabulary 151936`. Forward and backward, student
and teacher of one hidden size. Times are medians of rounds in which the subjects take turns, in one
process; memory is the peak of a process of its own beyond its inputs and the gradients. A subject
that needs more memory than there is, is left out, and named.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import psutil
import torch

from kdflow_core.allocator import keep_large_blocks
from kdflow_core.contracts import HiddenSignal, OutputHead
from kdflow_core.losses import LOSSES
from kdflow_core.losses.chunked import chunk_rows, distillation_loss
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.folding import Folding

ROOT = Path(__file__).parents[2]
# How many tensors of full logits a subject holds at a time, roughly; others hold chunks.
FULL_LOGITS = {"naive forward_kl": 9, "naive generalized_jsd": 12}


class Problem:
    """Random states and heads; a student's gradients are made by each call and let go."""

    def __init__(self, args: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, args.dtype)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).to(self.device)

        self.args = args
        self.hidden_TH = random(args.tokens, args.hidden).requires_grad_()
        self.weight_VH = (random(args.vocabulary, args.hidden) / 32).requires_grad_()
        self.teacher_TG = random(args.tokens, args.hidden)
        self.teacher_VG = random(args.vocabulary, args.hidden) / 32
        self.targets_T = torch.randint(0, args.vocabulary, (args.tokens,), generator=generator)
        self.targets_T = self.targets_T.to(self.device)
        self.folding_spec = self.folded()
        self.weights_T = torch.full((args.tokens,), 1 / args.tokens, device=self.device)

    def folded(self) -> LossSpec:
        """Forward KL of classes: a quarter of the tokens of both sides are in others' classes."""
        size = self.args.vocabulary
        count = 3 * size // 4
        classes_V = torch.arange(size) % count
        folding = Folding(
            student_V=classes_V.to(self.device),
            teacher_W=classes_V.flip(0).to(self.device),
            count=count,
        )
        return replace(self.spec("forward_kl"), folding=folding)

    def spec(self, name: str) -> LossSpec:
        divergence = LOSSES[name]()
        return LossSpec(
            divergence=divergence, kd_ratio=1.0, logits_bytes=self.args.logits_mb * 10**6
        )

    @property
    def gradient_bytes(self) -> int:
        return self.hidden_TH.nbytes + self.weight_VH.nbytes

    def bare(self) -> None:
        """The four products, chunk by chunk, into buffers that are there."""
        dtype, T = self.weight_VH.dtype, self.args.tokens
        C = min(T, chunk_rows(self.spec("forward_kl"), self.args.vocabulary, torch.float32))
        with torch.no_grad():
            student_CV = self.weight_VH.new_empty(C, self.args.vocabulary, dtype=dtype)
            teacher_CV = torch.empty_like(student_CV)
            dW_VH, dh_TH = torch.zeros_like(self.weight_VH), torch.zeros_like(self.hidden_TH)
            for begin in range(0, T, C):
                h_CH, g_CG = self.hidden_TH[begin : begin + C], self.teacher_TG[begin : begin + C]
                z_CV = torch.mm(h_CH, self.weight_VH.T, out=student_CV[: len(h_CH)])
                torch.mm(g_CG, self.teacher_VG.T, out=teacher_CV[: len(h_CH)])
                torch.mm(z_CV, self.weight_VH, out=dh_TH[begin : begin + C])
                dW_VH.addmm_(z_CV.T, h_CH)

    def ours(self, spec: LossSpec) -> None:
        output = distillation_loss(
            student_hidden_TH=self.hidden_TH,
            student_head=OutputHead(weight_VH=self.weight_VH),
            teacher=HiddenSignal(self.teacher_TG, OutputHead(weight_VH=self.teacher_VG)),
            target_ids_T=self.targets_T,
            weights_T=self.weights_T,
            spec=spec,
        )
        self._backward(output.loss)

    def naive(self, name: str) -> None:
        """Full logits of both models in float32, and autograd."""
        kl_div = torch.nn.functional.kl_div
        log_q_TV = torch.log_softmax((self.hidden_TH @ self.weight_VH.T).float(), -1)
        log_p_TV = torch.log_softmax((self.teacher_TG @ self.teacher_VG.T).float(), -1)
        if name == "forward_kl":
            self._backward(kl_div(log_q_TV, log_p_TV, reduction="batchmean", log_target=True))
            return
        log_m_TV = torch.logaddexp(log_p_TV, log_q_TV) - torch.tensor(2.0).log()
        halves = (
            kl_div(log_m_TV, log_TV, reduction="batchmean", log_target=True)
            for log_TV in (log_p_TV, log_q_TV)
        )
        self._backward(sum(halves) / 2)  # type: ignore[arg-type]

    def trl(self, beta: float) -> None:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        heads = (self.hidden_TH, self.weight_VH, None, self.teacher_TG, self.teacher_VG, None)
        loss_T, _ = ChunkedDivergenceFunction.apply(*heads, beta)
        self._backward(loss_T.mean())

    def liger(self) -> None:
        """Its default of 1024 tokens a chunk, bounded like ours."""
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        rows = chunk_rows(self.spec("generalized_jsd"), self.args.vocabulary, torch.float32)
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=0.5,
            compiled=self.device.type == "cuda",
            chunk_size=min(1024, rows),
        )
        heads = (self.hidden_TH, self.weight_VH, self.teacher_TG, self.teacher_VG)
        self._backward(loss(*heads, self.targets_T))

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.hidden_TH.grad = self.weight_VH.grad = None

    def subjects(self) -> dict[str, Callable[[], None]]:
        return {
            "bare products": self.bare,
            "kdflow forward_kl": lambda: self.ours(self.spec("forward_kl")),
            "kdflow reverse_kl": lambda: self.ours(self.spec("reverse_kl")),
            "kdflow generalized_jsd": lambda: self.ours(self.spec("generalized_jsd")),
            "kdflow classes": lambda: self.ours(self.folding_spec),
            "naive forward_kl": lambda: self.naive("forward_kl"),
            "naive generalized_jsd": lambda: self.naive("generalized_jsd"),
            "trl forward_kl": lambda: self.trl(0.0),
            "trl generalized_jsd": lambda: self.trl(0.5),
            "liger generalized_jsd": self.liger,
        }


def fits(name: str, args: argparse.Namespace) -> bool:
    """Whether a subject is asked for, and there is memory for its full logits."""
    if args.subjects and name not in ("bare products", *args.subjects):
        return False
    logits = FULL_LOGITS.get(name, 0) * args.tokens * args.vocabulary * 4
    return logits < psutil.virtual_memory().available


def seconds(problem: Problem, rounds: int) -> dict[str, float]:
    """Medians; the first round is not counted."""
    names = [name for name in problem.subjects() if fits(name, problem.args)]
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names:
            begin = time.perf_counter()
            problem.subjects()[name]()
            if problem.device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in taken.items()}


def peak_bytes(problem: Problem, name: str) -> int:
    """Of this process, beyond inputs and gradients."""
    if problem.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.subjects()[name]()
        return torch.cuda.max_memory_allocated() - before - problem.gradient_bytes
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = psutil.Process().memory_info().rss
    problem.subjects()[name]()
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return peak - before - problem.gradient_bytes


def peaks(args: argparse.Namespace) -> dict[str, float]:
    """Megabytes of each subject, in a process of its own, which gives back what it has freed."""
    found = {}
    for name in Problem.subjects(Problem.__new__(Problem)):
        if fits(name, args):
            command = [sys.executable, "-m", "tests.benchmarks.loss", *sys.argv[1:]]
            output = subprocess.run(
                [*command, "--peak-of", name],
                check=True,
                capture_output=True,
                text=True,
                cwd=ROOT,
            )
            found[name] = int(output.stdout.split()[-1]) / 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--logits-mb", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--subjects", nargs="*", help="these only, beside the bare products")
    parser.add_argument("--peak-of", help="measure one subject's memory alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.peak_of:
        print(peak_bytes(Problem(args), args.peak_of))  # noqa: T201 - the result
        return
    memory = peaks(args)
    keep_large_blocks()  # as training runs
    problem = Problem(args)
    taken = seconds(problem, args.rounds)
    logits = 2 * args.vocabulary * 4
    rows = min(args.tokens, chunk_rows(problem.spec("forward_kl"), args.vocabulary, torch.float32))
    versions = ("torch", "trl", "liger-kernel")
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {problem.device.type}",
        "versions": {name: metadata.version(name) for name in versions},
        "sizes": vars(args) | {"chunk": rows},
        "left out": [n for n in problem.subjects() if n not in taken],
        "seconds": {name: round(value, 3) for name, value in taken.items()},
        "times the bare products": {
            name: round(value / taken["bare products"], 3) for name, value in taken.items()
        },
        "MB beyond inputs and gradients": {name: round(value) for name, value in memory.items()},
        "MB of a chunk's logits": round(logits * rows / 1e6),
    }
    print(json.dumps(result, indent=1))  # noqa: T201 - the result


if __name__ == "__main__":
    main()
