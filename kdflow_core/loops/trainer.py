"""The one training loop: steps over examples, with checkpoints and metrics."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from configs.schema.student import StudentConfig
from kdflow_core.contracts import Examples, SignalSource
from kdflow_core.errors import StoppedError, TrainingError
from kdflow_core.loops.recorded import StepsToRecord
from kdflow_core.sinks import MetricsSink, Reporter
from kdflow_core.student.checkpoint import (
    CheckpointCopies,
    CheckpointWriter,
    completed_steps,
    load_newest,
    load_weights,
)
from kdflow_core.student.module import DistillationModule
from kdflow_core.student.optim import build_optimizers
from kdflow_core.student.rates import rate_factor
from kdflow_core.student.schedule import StepBatches
from kdflow_core.student.step import StepMetrics, training_step
from kdflow_core.student.timed import TimedSignals


class Trainer:
    """A student in training, `step` of its `num_steps` optimizer steps done.

    It begins at the newest of its `checkpoints`, of which it may keep `copies`.
    """

    def __init__(
        self,
        *,
        module: DistillationModule,
        num_steps: int,
        seed: int,
        config: StudentConfig,
        checkpoints: Path,
        reporter: Reporter,
        device: torch.device,
        is_asked_to_stop: Callable[[], bool] = lambda: False,
        copies: CheckpointCopies | None = None,
    ) -> None:
        self.module = module
        self.optimizers = build_optimizers(module, config)
        # A checkpoint brings the rates of its last step.
        self._peaks = [group["lr"] for group in self.optimizers.param_groups]
        self.step = load_newest(checkpoints, module, self.optimizers.parts, reporter.message)
        self._num_steps = num_steps
        self._seed = seed
        self._config = config
        self._checkpoints = CheckpointWriter(
            checkpoints, keep=config.keep_checkpoints, copies=copies, tell=reporter.message
        )
        self._reporter = reporter
        self._device = device
        self._is_asked_to_stop = is_asked_to_stop
        self._skipped = 0
        self._metrics: MetricsSink | None = None
        self._marks: Mapping[str, Any] = {}
        self._unrecorded = StepsToRecord()
        self._saved, self._saved_step = time.monotonic(), self.step
        self._folder = checkpoints
        reporter.message(
            f"training from step {self.step} of {num_steps}"
            + (" (resumed from a checkpoint)" if self.step else "")
        )

    def run(
        self,
        stop: int,
        *,
        batches_of: Callable[[int], StepBatches],
        examples: Examples,
        states: Sequence[SignalSource],
        metrics: MetricsSink,
        first: int = 0,
        marks: Mapping[str, Any] | None = None,
        after_step: Callable[[int], bool] | None = None,
    ) -> None:
        """Train until `stop` steps are done, or `after_step`, called with the steps that are
        done, says that it is enough. Saves on the way as the config says; the caller saves at the
        end. Where a rank is asked to stop, all save after the step that they are at. Raises
        StoppedError then.

        What `batches_of` and the `states` are asked for is counted from step `first` on.

        `metrics` get a record for every `log_every` steps, and before a checkpoint and at the end
        for those that are left: so no record is of steps on both sides of a checkpoint that a run
        may go on from. `marks` stand in all of them.
        """
        self.module.train()
        timed = [TimedSignals(source) for source in states]
        self._metrics, self._marks = metrics, marks or {}
        while self.step < stop:
            self._step(batches_of(self.step - first), self.step - first, examples, timed)
            if self.step % self._config.log_every == 0 or self.step == stop:
                self._record()
            enough = after_step is not None and after_step(self.step)
            if enough or self.step == stop:
                break
            asked, due = self._agreed(self._is_asked_to_stop(), self._is_due())
            if asked:
                self.save()
                self.wait()
                raise StoppedError(
                    f"stopped as asked, {self.step} of {self._num_steps} steps are saved"
                )
            if due:
                self.save()

    def save(self, *, hold: bool = False) -> None:
        """A checkpoint of what is done, written while the caller goes on. With `hold`, it is kept
        until another one is held.
        """
        if hold:
            self._checkpoints.held = self.step
        if self.step and self.step == self._saved_step:
            return
        self._record()
        self._checkpoints.save(self.step, self.module, self.optimizers.parts)
        self._saved, self._saved_step = time.monotonic(), self.step

    def saved_steps(self) -> list[int]:
        """The steps whose checkpoints are there, the same on all ranks."""
        self.wait()
        dist.barrier()
        return completed_steps(self._folder)

    def hold(self, step: int) -> None:
        """Keep the checkpoint of an earlier step until another one is held."""
        self._checkpoints.held = step

    def go_back_to(self, step: int) -> None:
        """Have the weights of a step whose checkpoint is there. Training does not go on then."""
        load_weights(self._folder, step, self.module)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk."""
        self._checkpoints.wait()

    def _is_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        minutes = self._config.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self._saved >= 60 * minutes
        return late or self.step % self._config.checkpoint_every == 0

    def _agreed(self, *found: bool) -> list[bool]:
        """What any rank has found: the same on all of them."""
        if dist.get_world_size() == 1:
            return list(found)
        flags = torch.tensor(found, dtype=torch.uint8, device=self._device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]

    def _step(
        self,
        batches: StepBatches,
        number: int,
        examples: Examples,
        states: Sequence[TimedSignals],
    ) -> None:
        started, rank = time.perf_counter(), dist.get_rank()
        waited = sum(source.seconds for source in states)
        lr = self._set_learning_rates()
        # Dropout, where a model has it, depends on step and rank alone: a resumed run repeats it.
        drawn = np.random.SeedSequence([self._seed, self.step, rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(drawn[0]))
        for source in states:
            source.begin_step(number)
        result = training_step(
            module=self.module,
            optimizers=self.optimizers,
            batches=batches,
            examples=examples,
            states=states,
            rank=rank,
            config=self._config,
            device=self._device,
        )
        self.step += 1
        if result.fault is not None:
            self._skip(result.fault)
            return
        seconds = time.perf_counter() - started
        marks = {"step": self.step, **self._marks, "epoch": batches.epoch, "lr": lr}
        passed = sum(source.seconds for source in states) - waited if states else None
        self._unrecorded.add(result, batches, marks=marks, seconds=seconds, waited_s=passed)
        if rank == 0:  # a step is one for all ranks
            self._tell(result, batches.num_input_tokens / seconds)

    def _record(self) -> None:
        """Write the record of the steps that have none."""
        if self._metrics is not None and self._unrecorded.steps:
            self._metrics.write(self._unrecorded.record())
        self._unrecorded = StepsToRecord()

    def _tell(self, result: StepMetrics, rate: float) -> None:
        shown = [name for name in ("loss", "kd", "span") if name in result.terms]
        terms = ", ".join(f"{name} {result.terms[name]:.4f}" for name in shown)
        self._reporter.progress(
            done=self.step,
            total=self._num_steps,
            unit="steps",
            detail=f"{terms}, {rate:,.0f} tokens/s",
        )

    def _skip(self, fault: str) -> None:
        """Go on without a step, as long as that is allowed. Raises TrainingError."""
        self._skipped += 1
        most = self._config.max_skipped_steps
        if self._skipped > most:
            self._record()
            raise TrainingError(
                f"step {self.step}: {fault}; lower student.lr, or look at these samples"
                + (f" ({most} steps were left out before)" if most else "")
                + ". The last checkpoint is intact"
            )
        self._reporter.message(
            f"step {self.step} is left out, the {self._skipped}. of {most} at most: {fault}"
        )

    def _set_learning_rates(self) -> float:
        """Every group's by its own peak; the run's own is returned."""
        factor = rate_factor(self._config, step=self.step, num_steps=self._num_steps)
        for group, peak in zip(self.optimizers.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        return self._config.lr * factor
