"""What training records: one record for the steps since the last one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdflow_core.student.schedule import StepBatches
from kdflow_core.student.step import StepMetrics, TermTotal


@dataclass
class StepsToRecord:
    """Some steps in a row. Of a term of the loss they have the mean over all their tokens, of the
    rest the mean over the steps; the marks are those of the last step.
    """

    steps: int = 0
    totals: dict[str, TermTotal] = field(default_factory=dict)
    grad_norms: float = 0.0
    seconds: float = 0.0
    waited_s: float | None = None
    tokens: int = 0
    positions: int = 0
    marks: Mapping[str, Any] = field(default_factory=dict)

    def add(
        self,
        metrics: StepMetrics,
        batches: StepBatches,
        *,
        marks: Mapping[str, Any],
        seconds: float,
        waited_s: float | None,
    ) -> None:
        """One more step, whose `marks` are the record's if it stays the last. In `waited_s` of its
        seconds it waited for its teachers, if it has any.
        """
        self.steps += 1
        for name, total in metrics.totals.items():
            self.totals[name] = total + self.totals.get(name, TermTotal(0.0, 0.0))
        self.grad_norms += metrics.grad_norm
        self.seconds += seconds
        if waited_s is not None:
            self.waited_s = waited_s + (self.waited_s or 0.0)
        self.tokens += batches.num_input_tokens
        self.positions += batches.num_positions
        self.marks = marks

    def record(self) -> dict[str, Any]:
        """Their record."""
        record = {**self.marks} | {name: total.mean for name, total in self.totals.items()}
        record |= {
            "grad_norm": self.grad_norms / self.steps,
            "seconds": self.seconds / self.steps,
            "tokens_per_s": self.tokens / self.seconds,
            "padding": 1 - self.tokens / self.positions,
        }
        if self.waited_s is not None:
            record["waiting"] = self.waited_s / self.seconds
        return record
