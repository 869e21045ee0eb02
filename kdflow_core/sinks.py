"""Where progress, messages and metrics of running work go."""

from collections.abc import Mapping
from typing import Any, Protocol


class Reporter(Protocol):
    """Where progress and messages of a running stage go."""

    def progress(
        self,
        *,
        done: int,
        total: int,
        unit: str,
        detail: str = "",
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Say how far the stage is; the receiver derives rate and time left. `figures` are numbers
        of this rank's, by name, for who watches it.
        """
        ...

    def message(self, text: str) -> None:
        """One line for the log."""
        ...


class MetricsSink(Protocol):
    """Receives one record of scalars per optimizer step."""

    def write(self, record: dict[str, Any]) -> None:
        """Take one step's record."""
        ...
