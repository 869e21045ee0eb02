"""What a run will take, and whether live or replay is cheaper: from a short probe."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from configs.schema.run import RunConfig
from configs.schema.teacher import InProcessTeacher
from kdflow_core.errors import DataError
from storage.artifact import ArtifactRef
from storage.store import ArtifactStore
from tasks.forecast.known_states import NOTHING_KNOWN, KnownStates, known_states
from tasks.stages.identity import find, open_store
from tasks.stages.planning import plan_stages

ESTIMATE_FILE = "estimate.json"
LOG_PROB_BYTES = 4  # of a token, where training reads no states
Delivery = Literal["replay", "live"]


class Estimate(BaseModel):
    """Counts of a run, and what a probe has measured on this machine.

    `replay_tokens` are the teacher's tokens when every distinct sequence is run once, `live_tokens`
    when training asks for its own at every step; `rows` are the supervised ones among the former.
    Rates are tokens per second, of one copy of the teacher and of all training ranks. `row_bytes`
    is by codec; `int8_kl` the mean KL of that codec in nats.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequences: int
    replay_tokens: int
    live_tokens: int
    rows: int
    student_tokens: int
    steps: int
    teacher_rate: float
    student_rate: float
    row_bytes: dict[str, float]
    int8_kl: float
    device_bytes: int | None
    teacher_peak_bytes: int | None
    student_peak_bytes: int | None


class Prospect(BaseModel):
    """What `planned_runs` runs take in all, by delivery, and which one is the choice and why. Of
    the teacher's tokens, the share `known` is taken over from other runs, if states are stored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stored_bytes: dict[str, int]
    extract_s: float
    live_teacher_s: float
    train_s: float
    replay_s: float
    live_s: float
    free_bytes: int | None
    fits: bool
    known: float
    delivery: Delivery
    reason: str


def read_estimate(store: ArtifactStore, ref: ArtifactRef) -> Estimate:
    """The estimate of an artifact."""
    text = (store.local_copy(ref) / ESTIMATE_FILE).read_text(encoding="utf-8")
    return Estimate.model_validate_json(text)


def prospect(
    run: RunConfig,
    estimate: Estimate,
    free_bytes: int | None,
    known: KnownStates = NOTHING_KNOWN,
) -> Prospect:
    """The times and sizes of a run with this config, and the cheaper delivery."""
    width = run.teacher.ranks_per_replica
    copies = run.teacher.num_ranks // width * run.teacher.num_workers
    sizes = estimate.row_bytes
    if run.learns_from_spans_alone:  # whatever the codec, which is for held-out states
        sizes = dict.fromkeys(sizes, LOG_PROB_BYTES)
    stored = {name: int(size * estimate.rows) for name, size in sizes.items()}
    unknown_tokens = (1 - known.tokens) * estimate.replay_tokens
    extract_s = unknown_tokens / estimate.teacher_rate / copies
    live_copies = max(run.student.num_ranks // width, 1)
    live_teacher_s = estimate.live_tokens / estimate.teacher_rate / live_copies
    train_s = estimate.student_tokens / estimate.student_rate
    replay_s = extract_s + run.planned_runs * train_s
    live_s = run.planned_runs * (train_s + live_teacher_s)
    fits = free_bytes is None or (1 - known.rows) * stored[run.storage.codec] <= free_bytes
    problem = why_not_live(run, estimate)
    delivery: Delivery = "replay"
    if problem:
        reason = problem
    elif not fits:
        delivery, reason = "live", "the states do not fit the disk"
    elif live_s <= replay_s:
        delivery, reason = "live", "the teacher has no more to do than for storing its states"
    else:
        reason = f"live takes {live_s / replay_s:.1f} times as long"
    return Prospect(
        stored_bytes=stored,
        extract_s=extract_s,
        live_teacher_s=live_teacher_s,
        train_s=train_s,
        replay_s=replay_s,
        live_s=live_s,
        free_bytes=free_bytes,
        fits=fits,
        known=known.tokens,
        delivery=delivery,
        reason=reason,
    )


def why_not_live(run: RunConfig, estimate: Estimate) -> str:
    """Why the teacher cannot run in the training ranks; empty when it can."""
    width = run.teacher.ranks_per_replica
    if not isinstance(run.teacher, InProcessTeacher):
        return f"teacher.type={run.teacher.type} does not run in the training ranks"
    if len(run.teacher_names) > 1:
        return "several teachers are replayed, not run in the training ranks"
    if run.student.num_ranks % width:
        return f"{run.student.num_ranks} training ranks cannot hold a teacher over {width}"
    if run.student.shuffle_window_shards is not None:
        return "student.shuffle_window_shards asks for stored states"
    total, teacher, student = (
        estimate.device_bytes,
        estimate.teacher_peak_bytes,
        estimate.student_peak_bytes,
    )
    if total is not None and teacher is not None and student is not None:
        together = max(teacher, student) if run.teacher.sleep else teacher + student
        if together > total:
            return "teacher and student do not fit the device together"
    return ""


def with_delivery(run: RunConfig, delivery: Delivery) -> RunConfig:
    """A run with `delivery: auto` decided. Fields that a replay does not use are left at their
    defaults.
    """
    fields: Mapping[str, Any] = run.model_dump(mode="json")
    changed = dict(fields) | {"delivery": delivery}
    if delivery == "replay" and isinstance(run.teacher, InProcessTeacher):
        changed["teacher"] = dict(fields["teacher"]) | {"sleep": False, "forward_batches": None}
    return RunConfig.model_validate(changed)


def prospect_here(run: RunConfig, estimate: Estimate) -> Prospect:
    """The prospect of a run in its store, where what is there costs nothing more. A run that was
    decided stays so: its own states, which take room, change nothing.
    """
    deliveries: list[Delivery] = ["replay"]
    if not why_not_live(run, estimate):
        deliveries.append("live")
    plans = {d: plan_stages(with_delivery(run, d)) for d in deliveries}
    known = known_states(run, plans["replay"])
    found = prospect(run, estimate, open_store(run).free_bytes(), known)
    states = [i for i in plans["replay"].values() if i.kind in ("states", "log_probs")]
    if all(find(run, identity) is not None for identity in states):
        replay_s = run.planned_runs * found.train_s
        found = found.model_copy(
            update={
                "extract_s": 0.0,
                "replay_s": replay_s,
                "fits": True,
                "delivery": "replay",
                "reason": "the states are stored already",
            }
        )
    for delivery, plan in plans.items():
        if find(run, plan["train"]) is not None:
            reason = "its student is trained already"
            return found.model_copy(update={"delivery": delivery, "reason": reason})
    return found


def decided(run: RunConfig, estimate: ArtifactRef) -> RunConfig:
    """The run with the delivery that its estimate chooses."""
    outcome = prospect_here(run, read_estimate(open_store(run), estimate))
    return with_delivery(run, outcome.delivery)


def check_room(run: RunConfig, outcome: Prospect) -> None:
    """Refuse a replay that will not fit. Raises DataError."""
    if outcome.fits or run.delivery == "live" or not run.storage.check_room:
        return
    size, free = outcome.stored_bytes[run.storage.codec], outcome.free_bytes or 0
    raise DataError(
        f"the states take {size / 1e9:.3f} GB as {run.storage.codec}, and {run.storage.root} has "
        f"{free / 1e9:.3f} GB free; set storage.codec to a smaller one, storage.root to a larger "
        "disk, delivery=live, or storage.check_room=false to go on all the same"
    )
