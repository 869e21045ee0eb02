"""The rounds of a training that another one goes on with."""

from configs.schema.run import RunConfig
from storage.artifact import ArtifactRef
from storage.store import ArtifactStore
from tasks.stages.catalogue import CATALOGUE, RoundArtifact
from tasks.stages.identity import StageIdentity
from tasks.stages.planning import round_identity

STUDENT = CATALOGUE["train"].kind


class EarlierRounds:
    """How many rounds a run's student has been through before its own (`count`; 0: it begins with
    them), and what is left of those, also where that training went on with another one.
    """

    def __init__(self, run: RunConfig, store: ArtifactStore) -> None:
        self._store = store
        self._trainings: list[StageIdentity] = []  # the last one first
        self.student = (
            None if run.student.continues is None else store.find_named(run.student.continues)
        )
        self.count = 0 if self.student is None else self.student.counts.get("rounds", 0)
        ref = self.student
        while ref is not None:
            manifest = store.manifest(ref.kind, ref.digest)
            self._trainings.append(
                StageIdentity(
                    stage="train",
                    output=STUDENT,
                    kind=ref.kind,
                    code_version=manifest.code_version,
                    config=manifest.config,
                    inputs=manifest.inputs,
                )
            )
            before = manifest.inputs.get("continues")
            ref = None if before is None else store.find(STUDENT, before)

    def find(self, made: RoundArtifact, number: int) -> ArtifactRef | None:
        """An artifact of one of these rounds, where it is intact."""
        identities = [round_identity(training, made, number) for training in self._trainings]
        found = (self._store.find(own.kind, own.digest) for own in identities)
        return next((ref for ref in found if ref is not None), None)
