"""The compute of on-policy rounds: the teacher scores what a round trains on, the student trains.

Written against the protocols of `contracts`: the caller says where examples come from and where
figures go.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch.distributed as dist

from kdflow_core.batching import Division
from kdflow_core.contracts import Example, Examples, SignalSource
from kdflow_core.errors import TrainingError
from kdflow_core.loops.measure import (
    HeldoutScores,
    LogProbDifference,
    Measuring,
    log_prob_difference,
)
from kdflow_core.loops.trainer import Trainer
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.sinks import MetricsSink
from kdflow_core.student.schedule import BatchSchedule

CHECKED_SAMPLES = 8  # whose log-probabilities are compared with the engine's, of a round


class RoundExamples(Examples, Protocol):
    """What a round trains on; those first that the student has sampled for it."""

    @property
    def sampled(self) -> Sequence[Example]:
        """The round's own samples."""
        ...


class Sleeper(Protocol):
    """A student that can leave the device while others work."""

    def sleep(self) -> None:
        """Leave it. Nothing to do when asleep."""
        ...

    def wake(self) -> None:
        """Come back. Nothing to do when awake."""
        ...


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """`steps` optimizer steps a round, of batches as `BatchSchedule` has them; answers are sampled
    at `temperature`.
    """

    steps: int
    global_batch_size: int
    division: Division
    seed: int
    temperature: float


@dataclass(frozen=True, kw_only=True)
class RoundFigures:
    """What came of a round's training; see `RoundRecord`. Times in seconds, by part."""

    last_step: int
    log_prob_difference: LogProbDifference | None
    heldout_before: HeldoutScores | None
    heldout: HeldoutScores | None
    seconds: dict[str, float]

    def plain(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """A round that is scored: what it trains on, in which steps, and the teacher's signals."""

    number: int
    examples: RoundExamples
    schedule: BatchSchedule
    signals: SignalSource | None


# The signals of a round's examples, by a teacher in these ranks.
MakeSignals = Callable[[Examples, BatchSchedule], SignalSource]


class RoundTrainer:
    """Scores and trains rounds, on every rank. Between the two, the signals wait here.

    Without a `sleeper`, the student stays on the device while others work.
    """

    def __init__(
        self,
        *,
        trainer: Trainer,
        measuring: Measuring,
        measure_heldout: Callable[[], HeldoutScores | None],
        make_signals: MakeSignals | None,
        sleeper: Sleeper | None,
        spec: LossSpec,
        settings: RoundSettings,
    ) -> None:
        self._trainer = trainer
        self._measuring = measuring
        self._measure_heldout = measure_heldout
        self._make_signals = make_signals
        self._sleeper = sleeper
        self._spec = spec
        self._settings = settings
        self._scored: _Scored | None = None

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self._trainer.step

    def last_step(self, number: int) -> int:
        """The step that a round ends with."""
        return number * self._settings.steps

    def is_trained(self, number: int) -> bool:
        """Whether the student has been through a round."""
        return self.step >= self.last_step(number)

    def score(self, number: int, examples: RoundExamples) -> dict[str, int]:
        """Have the teacher score all that the round trains on; how much that is."""
        schedule = self._schedule(number, examples)
        signals = None
        if self._make_signals is not None:
            signals = self._make_signals(examples, schedule)
            self.leave_device()
            signals.begin_step(0)
        self._scored = _Scored(number=number, examples=examples, schedule=schedule, signals=signals)
        rows = int(examples.supervised_counts("student").sum())
        return {"examples": len(examples), "rows": rows}

    def train(
        self, number: int, examples_of: Callable[[], RoundExamples], metrics: MetricsSink
    ) -> RoundFigures:
        """The round's optimizer steps, as far as they are not done; and what is measured. Its
        examples are asked for where the round was not scored here.

        Raises TrainingError where the student is not at this round.
        """
        last, steps = self.last_step(number), self._settings.steps
        if not last - steps <= self.step < last:
            raise TrainingError(
                f"round {number} begins at step {last - steps}, and the student is at {self.step}"
            )
        if self._scored is None or self._scored.number != number:
            self.score(number, examples_of())  # a new process, where an old one had scored it
        assert self._scored is not None
        scored = self._scored
        if self._sleeper is not None:
            self._sleeper.wake()
        started = time.perf_counter()
        before = self._measure_heldout() if self.step == 0 else None
        difference = self._check_samples(scored.examples.sampled)
        measured = time.perf_counter()
        self._trainer.run(
            last,
            batches_of=scored.schedule.step,
            examples=scored.examples,
            states=[] if scored.signals is None else [scored.signals],
            metrics=metrics,
            first=last - steps,
            marks={"round": number},
        )
        trained = time.perf_counter()
        heldout = self._measure_heldout()
        measuring = time.perf_counter() - trained + measured - started
        self._scored = None
        return RoundFigures(
            last_step=last,
            log_prob_difference=difference,
            heldout_before=before,
            heldout=heldout,
            seconds={"train": trained - measured, "measure": measuring},
        )

    def leave_device(self) -> None:
        """Make room for others, where the student may sleep."""
        if self._sleeper is not None:
            self._sleeper.sleep()

    def _schedule(self, number: int, examples: Examples) -> BatchSchedule:
        settings = self._settings
        return BatchSchedule(
            lengths=examples.lengths("student"),
            supervised_counts=examples.supervised_counts("student"),
            global_batch_size=settings.global_batch_size,
            division=settings.division,
            num_ranks=dist.get_world_size(),
            seed=(settings.seed << 20) + number,
            epochs=None,
            max_steps=settings.steps,
        )

    def _check_samples(self, sampled: Sequence[Example]) -> LogProbDifference | None:
        chosen = sampled[:CHECKED_SAMPLES]
        if not chosen or self.step % self._settings.steps:
            return None  # mid-round, the weights are others than those that sampled
        return log_prob_difference(self._measuring, self._spec, self._settings.temperature, chosen)
