"""States that the same teacher has left in the store under other tokens.

A teacher's states go by what it reads. Another student tokenizer or template, other data beside
the same, another length limit make another artifact, and mostly the same teacher sequences: their
rows are copied, and the teacher runs for the rest. A copy has the last bits of the batch that it
was computed in.

Dimensions: N sequences or rows.
"""

from collections.abc import Sequence

import numpy as np
import torch.distributed as dist

from storage.artifact import ArtifactRef, Manifest
from storage.codecs import codec_named
from storage.errors import StoreCorruptError
from storage.states.reader import HiddenStateReader
from tasks.jobs.parts import rank_and_size
from tasks.jobs.stage_run import StageRun

MOST = 64  # artifacts that are looked at, the newest first


class EarlierStates:
    """Rows of the sequences that other artifacts hold."""

    def __init__(self, names: Sequence[str], readers: Sequence[HiddenStateReader]) -> None:
        self._names = names
        self._readers = readers

    def holder(self, digests: np.ndarray) -> np.ndarray:
        """Which artifact holds each of some sequences, by digests uint8 [N, 16]; -1 for none."""
        found_N = np.full(len(digests), -1)
        for number in reversed(range(len(self._readers))):
            found_N[self._readers[number].holds(digests)] = number
        return found_N

    def rows(self, holder: int, digest: bytes, target_ids_N: np.ndarray) -> np.ndarray:
        """A sequence's rows, see `HiddenStateReader.rows`."""
        try:
            return self._readers[holder].rows(digest, target_ids_N)
        except StoreCorruptError as error:
            raise StoreCorruptError(
                f"{self._names[holder]}, from which this run copies states: {error}"
            ) from error


def earlier_states(stage: StageRun, head_digest: str) -> EarlierStates:
    """What is there of the stage's teacher, on all ranks alike."""
    refs: list[list[ArtifactRef]] = [[]]
    rank, _ = rank_and_size()
    if rank == 0:
        manifests = stage.store.newest_manifests(stage.kind, MOST)
        refs[0] = [
            ref
            for manifest in manifests
            if _serves(stage, manifest, head_digest)
            and (ref := stage.store.find(manifest.kind, manifest.digest)) is not None
        ]
    if dist.is_initialized():
        dist.broadcast_object_list(refs)
    limit = int(stage.run.storage.read_cache_gb * 1e9)
    return EarlierStates(
        [f"{ref.kind}/{ref.digest}" for ref in refs[0]],
        [HiddenStateReader(store=stage.store, ref=ref, cache_bytes=limit) for ref in refs[0]],
    )


def _serves(stage: StageRun, manifest: Manifest, head_digest: str) -> bool:
    """Whether an artifact has exactly what this stage's teacher would make."""
    own = stage.spec.identity
    return (
        manifest.digest != stage.digest
        and manifest.code_version == own.code_version
        and manifest.inputs["teacher_model"] == own.inputs["teacher_model"]
        and manifest.config["teacher"] == own.config["teacher"]
        and manifest.info["head"]["digest"] == head_digest
        and codec_named(manifest.info["layout"]["codec"]).lossless
    )
