"""What the student of a run begins with: the recipe's model, or the one that was promoted last."""

from configs.schema.models import PretrainedModel
from configs.schema.run import RunConfig
from storage.artifact import ArtifactRef
from storage.errors import StoreError
from storage.promoted import promoted, promoted_path
from storage.store import ArtifactStore
from tasks.stages.identity import find, made_of, open_store
from tasks.stages.planning import plan_stages, used_by


def started(run: RunConfig) -> RunConfig:
    """A run with the model that its student begins with.

    With `student.start: latest` it is the promoted student of the runs of this name, if there is
    one. But where nothing has changed since that one was made, it is what that one began with: then
    there is nothing to do. Raises StoreError, DataError and ModelError.
    """
    if run.student.start == "fresh":
        return run
    store = open_store(run)
    last = promoted(store, run.name)
    if last is None:
        return run
    newest = store.find_named(last.student)
    if newest is None:
        raise StoreError(
            f"student.start=latest: the promoted student of {last.run}, {last.student}, is not in "
            f"{store.root} any more; remove {promoted_path(store, run.name)} to begin with "
            "student.model, or set student.start=fresh"
        )
    base = None if last.started_from is None else store.find_named(last.started_from)
    if last.started_from is None or base is not None:
        again = run if base is None else _from(run, base)
        if _is_done(again, last.student):
            return again
    return _from(run, newest)


def _is_done(run: RunConfig, student: str) -> bool:
    """Whether a run has made a student, and all that comes behind it, by either delivery where an
    estimate would decide.
    """
    deliveries = ("replay", "live") if run.delivery == "auto" else (run.delivery,)
    for delivery in deliveries:
        decided = run.model_copy(update={"delivery": delivery})
        plan = plan_stages(decided)
        made = used_by(decided, plan).values()
        if student in made and all(find(decided, identity) for identity in plan.values()):
            return True
    return False


def started_from(run: RunConfig) -> str | None:
    """The artifact that a `started` run begins with; None: the recipe's model."""
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
    model = PretrainedModel(
        type="pretrained",
        path=_model_folder(open_store(run), student),
        trust_remote_code=made_of(run, "student").trust_remote_code,
    )
    return run.model_copy(update={"student": run.student.model_copy(update={"model": model})})


def _model_folder(store: ArtifactStore, student: ArtifactRef) -> str:
    return str(store.local_copy(student) / "model")
