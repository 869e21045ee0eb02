"""Why a stage of a run would run, or that it would not."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from configs.schema.run import RunConfig
from kdflow_core.alignment.coverage import from_plain, summary
from storage.artifact import Manifest
from storage.store import ArtifactStore
from tasks.forecast.estimate import decided
from tasks.stages.catalogue import CATALOGUE, ROUND
from tasks.stages.earlier_rounds import EarlierRounds
from tasks.stages.identity import StageIdentity, find, open_store
from tasks.stages.planning import plan_stages, round_identities

MOST_COMPARED = 32  # artifacts that a new one is told apart from


class StageStatus(BaseModel):
    """What `kdflow plan` says about a stage: cached, or what changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: StageIdentity
    cached: bool
    reasons: tuple[str, ...]


def stage_status(run: RunConfig, plan: Mapping[str, StageIdentity]) -> list[StageStatus]:
    """For each stage of a plan: whether it will be served from cache, or why not. Where an
    estimate has decided on the source, the stages behind it follow.
    """
    store, statuses = open_store(run), []
    estimate = plan.get("estimate")
    if estimate and (ref := find(run, estimate)):
        plan = {**plan, **plan_stages(decided(run, ref))}
    for identity in plan.values():
        absent = store.why_absent(identity.kind, identity.digest)
        reasons = tuple(explain(identity, absent, store) if absent else _found(identity, store))
        if absent is not None and CATALOGUE[identity.stage].in_rounds(run):
            reasons += (_rounds_done(identity, run, store),)
        statuses.append(StageStatus(identity=identity, cached=absent is None, reasons=reasons))
    return statuses


def _found(identity: StageIdentity, store: ArtifactStore) -> list[str]:
    """What an artifact that is there says of the run: of tokens, how far two tokenizers agree."""
    if identity.kind != CATALOGUE["tokenize"].kind:
        return []
    info = store.manifest(identity.kind, identity.digest).info
    counts = info["alignment"]
    return [info["tokenizers"], *([summary(from_plain(counts))] if counts else [])]


def _rounds_done(train: StageIdentity, run: RunConfig, store: ArtifactStore) -> str:
    """How far an on-policy run has come."""
    rounds = [i for i in round_identities(train, run).values() if i.kind == ROUND.kind]
    done = sum(store.find(i.kind, i.digest) is not None for i in rounds)
    done += EarlierRounds(run, store).count
    return f"{done} of {len(rounds)} rounds are done"


def explain(identity: StageIdentity, absent: str, store: ArtifactStore) -> list[str]:
    """Why a stage runs: its artifact is damaged, or what differs from the nearest finished one."""
    if absent != "never finished":
        return [absent]
    candidates = [
        _differences(identity, m) for m in store.newest_manifests(identity.kind, MOST_COMPARED)
    ]
    if not candidates:
        return ["no artifact of this kind yet"]
    return min(candidates, key=len)


def _differences(identity: StageIdentity, manifest: Manifest) -> list[str]:
    lines = []
    if identity.code_version != manifest.code_version:
        lines.append(f"code version: {manifest.code_version} -> {identity.code_version}")
    old, new = _flatten(manifest.config), _flatten(identity.config)
    lines += [
        f"{key}: {old.get(key, '(unset)')} -> {new.get(key, '(unset)')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    for name in sorted(manifest.inputs.keys() | identity.inputs.keys()):
        before, after = manifest.inputs.get(name, "none"), identity.inputs.get(name, "none")
        if before != after:
            lines.append(f"input {name}: {before[:12]} -> {after[:12]}")
    return lines or ["its manifest was removed"]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        items = [(f"{prefix}.{k}" if prefix else str(k), v) for k, v in value.items()]
    elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        items = [(f"{prefix}.{i}", v) for i, v in enumerate(value)]
    else:
        return {prefix: value}
    return {k: v for name, inner in items for k, v in _flatten(inner, name).items()}
