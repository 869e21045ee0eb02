"""The teacher inside the training ranks: its output buffers go to the loss by reference.

Dimensions: N supervised tokens, R rows of an output, H hidden size.
"""

from collections.abc import Callable, Sequence

from kdflow_core.contracts import HiddenRows, TeacherEngine, TokenSequence
from kdflow_core.errors import AlignmentError
from kdflow_core.teacher.streaming import check_lengths


class LiveStates:
    """A `SignalSource` that scores the sequences of the coming steps and keeps their states.

    `sequences_of(step, rank)` are a rank's teacher sequences of an optimizer step. `ranks` are
    those that share one copy of the teacher: they run every batch of all of them together, and each
    keeps the states of its own sequences.
    """

    def __init__(
        self,
        *,
        engine: TeacherEngine,
        hidden_size: int,
        sequences_of: Callable[[int, int], Sequence[TokenSequence]],
        rank: int,
        ranks: Sequence[int],
        num_steps: int,
        steps_at_once: int,
        sleep: bool,
    ) -> None:
        self.hidden_size = hidden_size
        self._engine = engine
        self._sequences_of = sequences_of
        self._rank = rank
        self._ranks = ranks
        self._num_steps = num_steps
        self._steps_at_once = steps_at_once
        self._sleep = sleep
        self._scored = range(0)
        self._rows: dict[bytes, HiddenRows] = {}

    def begin_step(self, step: int) -> None:
        """Score this step and the ones after it, unless that is done."""
        if step in self._scored:
            return
        self._rows = {}  # let go of the last buffers before new ones are made
        self._scored = range(step, min(step + self._steps_at_once, self._num_steps))
        own = {s.digest for k in self._scored for s in self._sequences_of(k, self._rank)}
        # A sequence that comes up twice is scored once.
        wanted = {
            s.digest: s
            for k in self._scored
            for rank in self._ranks
            for s in self._sequences_of(k, rank)
        }
        self._engine.wake()
        self._score(list(wanted.values()), own)
        if self._sleep:
            self._engine.sleep()

    def _score(self, sequences: Sequence[TokenSequence], own: set[bytes]) -> None:
        lengths = [len(s.ids_T) for s in sequences]
        check_lengths(max(lengths, default=0), self._engine.max_length)
        for batch in self._engine.pack(lengths):
            chosen = [sequences[i] for i in batch]
            for sequence, rows in zip(chosen, self._engine.forward(chosen), strict=True):
                if sequence.digest in own:
                    self._rows[sequence.digest] = rows

    def rows(self, sequence: TokenSequence) -> HiddenRows:
        """See `SignalSource`."""
        if sequence.digest not in self._rows:
            raise AlignmentError(
                f"the live teacher scored no sequence with digest {sequence.digest.hex()} for "
                f"steps {self._scored.start} to {self._scored.stop - 1}"
            )
        return self._rows[sequence.digest]

    def close(self) -> None:
        """Free the teacher."""
        self._rows = {}
        self._engine.close()
