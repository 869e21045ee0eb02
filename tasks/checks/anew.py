"""Stages that are to be made anew, though their artifacts are there."""

import shutil
from collections.abc import Mapping

from configs.errors import ConfigError
from configs.schema.run import RunConfig
from storage.kept_checkpoints import KeptCheckpoints
from storage.maintenance import entries, remove_artifact
from tasks.stages.identity import StageIdentity, open_store
from tasks.stages.planning import used_by


def forget_from(run: RunConfig, stages: Mapping[str, StageIdentity], first: str) -> list[str]:
    """Remove the artifacts of a stage and of all behind it, with what is begun of them and with
    their checkpoints; those that were there, as `kind/digest`. Other runs that use them make them
    again, too. Raises ConfigError, and StoreError while somebody computes one.
    """
    if first not in stages:
        raise ConfigError(f"this run has no stage '{first}'; it has {', '.join(stages)}")
    names = list(stages)
    used = used_by(run, stages)
    later = {stage: used[stage] for stage in names[names.index(first) :]}
    if "train" in later:  # and with it the rounds of on-policy training
        later |= {name: own for name, own in used.items() if name not in stages}
    store, removed = open_store(run), []
    there = {entry.name: entry for entry in entries(store)}
    for name in later.values():
        kind, _, digest = name.partition("/")
        if name in there:
            remove_artifact(store, there[name])
            removed.append(name)
        shutil.rmtree(store.scratch / kind / digest, ignore_errors=True)
        KeptCheckpoints(store, kind, digest).remove()
    return removed
