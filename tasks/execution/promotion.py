"""Whether the student of a run that has come to its end counts as the latest one."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from configs.schema.run import RunConfig
from storage.artifact import ArtifactRef
from storage.errors import StoreError
from storage.promoted import Promoted, promote, promoted
from storage.runs import run_id
from storage.store import ArtifactStore
from tasks.checks.start import started_from
from tasks.presentation.history import STUDENT
from tasks.presentation.sample_scores import differences, read_sums
from tasks.stages.identity import StageIdentity, open_store
from tasks.stages.planning import used_by

BETTER_HIGH = ("agreement",)


class Promotion(NamedTuple):
    """What became of a student, and why, in words."""

    outcome: Literal["promoted", "kept-back", "unchanged"]
    text: str


def promote_student(
    run: RunConfig, stages: Mapping[str, StageIdentity], done: Mapping[str, ArtifactRef]
) -> Promotion:
    """Promote the student of a run, unless it is worse than what counts now."""
    store = open_store(run)
    try:
        last = promoted(store, run.name)
        student, evaluation = done["student"], done["evaluation"]
        if last is not None and last.student == student.name:
            return Promotion("unchanged", f"the student of {last.run} counts already")
        worse = None if last is None else _worse(run, store, last, evaluation)
        if worse is not None:
            return Promotion("kept-back", f"not promoted: {worse}")
        promote(
            store,
            run.name,
            run=run_id(run.name, used_by(run, stages)),
            student=student.name,
            evaluation=evaluation.name,
            started_from=started_from(run),
        )
    except StoreError as error:
        return Promotion("kept-back", f"not promoted: {error}")
    return Promotion("promoted", "promoted: student.start=latest goes on with this student")


def _worse(
    run: RunConfig, store: ArtifactStore, last: Promoted, evaluation: ArtifactRef
) -> str | None:
    """In what the student is worse than the one that counts; None where it is not, or where the two
    cannot be compared.
    """
    metric = run.promotion.metric
    before = store.find_named(last.evaluation)
    if metric is None or before is None:
        return None
    sums = [read_sums(store.local_copy(ref), STUDENT) for ref in (before, evaluation)]
    found = differences(sums[0], sums[1])[metric]
    if found.value is None:
        return None
    loss = -found.value if metric in BETTER_HIGH else found.value
    if loss <= run.promotion.tolerance:
        return None
    return (
        f"{metric} is worse by {loss:.4f} than that of {last.run}, over the {found.samples:,} "
        f"held-out samples of both (promotion.tolerance={run.promotion.tolerance:g})"
    )
