"""States that the same teacher has left in the store under other tokens.

A teacher's states go by what it reads. Another student tokenizer or template, other data beside
the same, another length limit make another artifact, and mostly the same teacher sequences: their
shards are taken over (`storage.states.borrowing`), or their rows copied, and the teacher runs for
the rest. What is not computed again has the last bits of the batch that it was computed in.

Dimensions: N sequences or rows.
"""

from collections.abc import Mapping

import numpy as np

from kdflow_core.contracts import TokenSequence
from storage.artifact import ArtifactRef
from storage.errors import StoreCorruptError
from storage.states.borrowing import Borrowed, settle_borrowed
from storage.states.files import StateFiles
from storage.states.layout import Layout, Sequences
from storage.states.reader import HiddenStateReader
from tasks.jobs.parts import agreed, open_states
from tasks.jobs.stage_run import StageRun
from tasks.stages.same_teacher import states_of_same_teacher


class EarlierStates:
    """Rows of some sequences, by digests uint8 [N, 16], that other artifacts hold, by their names.
    `held_N` says of which sequences.
    """

    def __init__(self, digests: np.ndarray, readers: Mapping[str, HiddenStateReader]) -> None:
        self._names, self._readers = list(readers), list(readers.values())
        self._holder_N = np.full(len(digests), -1)
        for number, reader in enumerate(self._readers):
            left = np.flatnonzero(self._holder_N < 0)
            self._holder_N[left[reader.holds(digests[left])]] = number
        self.held_N = self._holder_N >= 0

    def rows(self, number: int, sequence: TokenSequence) -> np.ndarray:
        """The rows of the sequence with this number, see `HiddenStateReader.rows`."""
        holder = int(self._holder_N[number])
        try:
            return self._readers[holder].rows(sequence.digest, sequence.target_ids_N)
        except StoreCorruptError as error:
            raise StoreCorruptError(
                f"{self._names[holder]}, from which this run copies states: {error}"
            ) from error


def earlier_states(stage: StageRun, head_digest: str, digests: np.ndarray) -> EarlierStates:
    """What is there of the stage's teacher and these sequences, on all ranks alike."""
    refs = agreed(lambda: _serving(stage, head_digest))
    return EarlierStates(digests, {ref.name: open_states(stage, ref) for ref in refs})


def borrowed_states(
    stage: StageRun, head_digest: str, layout: Layout, sequences: Sequences
) -> Borrowed:
    """The shards of such artifacts that the stage's own begins with, on all ranks alike; of a lossy
    codec, those of artifacts in the same.
    """

    def lenders() -> dict[str, HiddenStateReader]:
        codec = layout.codec
        return {ref.name: open_states(stage, ref) for ref in _serving(stage, head_digest, codec)}

    files = StateFiles(stage.store, stage.kind, stage.digest)
    return agreed(lambda: settle_borrowed(files, layout, sequences, lenders))


def _serving(stage: StageRun, head_digest: str, codec: str | None = None) -> list[ArtifactRef]:
    """Artifacts that hold what this stage's teacher would say, the newest first; exactly, or in a
    codec.
    """
    return [
        ref
        for manifest in states_of_same_teacher(stage.store, stage.spec.identity, codec)
        if manifest.info["head"]["digest"] == head_digest
        and (ref := stage.store.find(manifest.kind, manifest.digest)) is not None
    ]
