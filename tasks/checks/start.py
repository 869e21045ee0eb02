"""What the student of a run begins with: the recipe's model, the one that was promoted last, or
that one's training.
"""

from collections.abc import Mapping
from typing import Any

from configs.schema.models import PretrainedModel
from configs.schema.run import RunConfig
from storage.artifact import ArtifactRef
from storage.errors import StoreError
from storage.promoted import promoted, promoted_path
from storage.store import ArtifactStore
from tasks.stages.checkpoint_places import FinalCheckpoint
from tasks.stages.identity import find, made_of, open_store
from tasks.stages.planning import plan_stages


def started(run: RunConfig) -> RunConfig:
    """A run with the model that its student begins with.

    With `student.start: latest` it is the promoted student of the runs of this name, if there is
    one. But where nothing has changed since that one was made, it is what that one began with: then
    there is nothing to do. With `student.start: continue` the same goes for that student's
    training. Raises StoreError, DataError and ModelError.
    """
    if run.student.start == "fresh":
        return run
    store = open_store(run)
    if run.student.continues is not None:
        return _checked(run, _student(store, run.student.continues))
    last = promoted(store, run.name)
    if last is None:
        return run
    newest = store.find_named(last.student)
    if newest is None:
        raise StoreError(
            f"student.start={run.student.start}: the promoted student of {last.run}, "
            f"{last.student}, is not in {store.root} any more; remove "
            f"{promoted_path(store, run.name)} to begin with student.model, or set "
            "student.start=fresh"
        )
    base = None if last.started_from is None else store.find_named(last.started_from)
    if last.started_from is None or base is not None:
        again = run if base is None else _from(run, base)
        if _is_done(again, last.student):
            return again
    return _checked(_from(run, newest), newest)


def _is_done(run: RunConfig, student: str) -> bool:
    """Whether a run has made a student, by either delivery where an estimate would decide."""
    deliveries = ("replay", "live") if run.delivery == "auto" else (run.delivery,)
    for delivery in deliveries:
        decided = run.model_copy(update={"delivery": delivery})
        train = plan_stages(decided)["train"]
        if student == f"{train.kind}/{train.digest}" and find(decided, train) is not None:
            return True
    return False


def _student(store: ArtifactStore, name: str) -> ArtifactRef:
    found = store.find_named(name)
    if found is None:
        raise StoreError(
            f"student.continues: {name} is not in {store.root}; `kdflow history` lists students"
        )
    return found


# Of a student's config, what says which tensors a checkpoint holds.
CHECKPOINTED_FIELDS = ("lora", "optimizer", "parameter_groups", "weights_dtype")


def _checked(run: RunConfig, student: ArtifactRef) -> RunConfig:
    """A run that begins with a student. Raises StoreError where it cannot take up its training."""
    if run.student.start != "continue":
        return run
    store, name = open_store(run), student.name
    decided = run if run.delivery != "auto" else run.model_copy(update={"delivery": "live"})
    own = plan_stages(decided)["train"]
    if find(run, own) is not None:
        return run
    if not FinalCheckpoint(store, name).is_there:
        raise StoreError(
            f"student.start=continue: the store has no last checkpoint of {name}, which was "
            "trained without student.keep_final; set that and train it again (kdflow run --from "
            "train, with student.start=fresh), or go on with its weights (student.start=latest)"
        )
    manifest = store.manifest(student.kind, student.digest)
    before = _checkpointed(manifest.code_version, manifest.config, manifest.inputs)
    after = _checkpointed(own.code_version, own.config, own.inputs)
    other = [f"{k}: {before[k]}, now {v}" for k, v in after.items() if before[k] != v]
    if other:
        raise StoreError(
            f"student.start=continue: {name} was trained otherwise ({'; '.join(other)}), and its "
            "last checkpoint does not fit; train as it was, or go on with its weights "
            "(student.start=latest)"
        )
    if problem := _no_steps_left(run, manifest.counts):
        raise StoreError(f"student.start=continue: {name} {problem}")
    return run


def _no_steps_left(run: RunConfig, counts: Mapping[str, int]) -> str | None:
    """Why a training of so many steps cannot go on in this run; None where it can."""
    steps, rounds, most = counts["steps"], counts.get("rounds"), run.student.max_steps
    if (rounds is None) != (run.on_policy is None):
        trained = "steps of `mode: offpolicy`" if rounds is None else "rounds"
        return (
            f"was trained in {trained}, which are no part of `mode: {run.mode}`; go on with its "
            "weights (student.start=latest)"
        )
    if run.on_policy is not None and rounds is not None:
        each = run.on_policy.steps(run.student.global_batch_size)
        if steps != rounds * each:
            return (
                f"has {rounds} rounds of {steps // rounds} steps, and those of this run have "
                f"{each}; set on_policy.steps_per_round={steps // rounds}"
            )
        if run.on_policy.rounds <= rounds:
            return (
                f"has {rounds} rounds, which on_policy.rounds={run.on_policy.rounds} counts, too; "
                "raise it"
            )
    if most is not None and most <= steps:
        return f"has {steps} steps, which student.max_steps={most} counts, too; raise it"
    return None


def _checkpointed(
    code_version: int, config: Mapping[str, Any], inputs: Mapping[str, str]
) -> dict[str, Any]:
    """What has to be alike for one training to go on with another one's checkpoint."""
    student = config["student"]
    return {
        "code version": code_version,
        "student.model": inputs["student_model"],
        "algorithm": config["algorithm"],
    } | {f"student.{field}": student.get(field) for field in CHECKPOINTED_FIELDS}


def started_from(run: RunConfig) -> str | None:
    """The artifact that a `started` run begins with; None: the recipe's model."""
    if run.student.continues is not None:
        return run.student.continues
    store = open_store(run)
    last = promoted(store, run.name) if run.student.start == "latest" else None
    if last is None or not isinstance(run.student.model, PretrainedModel):
        return None
    for name in (last.student, last.started_from):
        ref = None if name is None else store.find_named(name)
        if ref is not None and run.student.model.path == _model_folder(store, ref):
            return name
    return None


def _from(run: RunConfig, student: ArtifactRef) -> RunConfig:
    if run.student.start == "continue":
        continuing = run.student.model_copy(update={"continues": student.name})
        return run.model_copy(update={"student": continuing})
    model = PretrainedModel(
        type="pretrained",
        path=_model_folder(open_store(run), student),
        trust_remote_code=made_of(run, "student").trust_remote_code,
    )
    return run.model_copy(update={"student": run.student.model_copy(update={"model": model})})


def _model_folder(store: ArtifactStore, student: ArtifactRef) -> str:
    return str(store.local_copy(student) / "model")
