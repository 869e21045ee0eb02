"""A round's answers, from the shares of the engines to one artifact."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict

from kdflow_core.errors import WorkerError
from storage.artifact import ArtifactRef
from storage.rollouts import join_rollouts
from storage.store import ArtifactStore
from tasks.stages.identity import StageIdentity, publish_workdir

SHARES = "shares"


class RolloutShare(BaseModel):
    """What an engine has written: answers at these `places` of the round, ascending, of so many
    that it was `asked` for; the version of its weights, the share of the round's prompts that the
    student answers, and its time in seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    places: tuple[int, ...]
    asked: int
    version: int
    fraction: float
    seconds: float


def share_folder(workdir: Path, rank: int) -> Path:
    """Where the engine of a rank writes its share."""
    return workdir / SHARES / f"{rank:04d}"


def publish_rollouts(
    store: ArtifactStore, identity: StageIdentity, number: int, shares: Sequence[RolloutShare]
) -> ArtifactRef:
    """The artifact of a round's answers, in the order of its prompts. Raises WorkerError where the
    engines have served other weights than one another.
    """
    versions = {share.version for share in shares}
    if len(versions) > 1:
        raise WorkerError(f"round {number} was rolled out by the weights {sorted(versions)}")
    workdir = store.workdir(identity.kind, identity.digest)
    folders = {share_folder(workdir, rank): share.places for rank, share in enumerate(shares)}
    rows = join_rollouts(workdir, folders)
    shutil.rmtree(workdir / SHARES)
    seconds = max(share.seconds for share in shares)
    # Where nothing is sampled, no weights are served, and none are stale.
    served = {"version": versions.pop() if rows else number - 1, "fraction": shares[0].fraction}
    return publish_workdir(
        store,
        identity,
        counts={
            "answers": len(rows),
            "tokens": sum(len(row["answer_ids"]) for row in rows),
            "cut_before_their_first_token": sum(share.asked for share in shares) - len(rows),
        },
        info=_figures(rows) | served | {"seconds": seconds},
        seconds=seconds,
    )


def _figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    lengths = [len(row["answer_ids"]) for row in rows]
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    return {
        "finish_reasons": dict(Counter(row["finish_reason"] for row in rows)),
        "mean_length": fmean(lengths) if lengths else 0.0,
        "longest": max(lengths, default=0),
        "reward_mean": fmean(rewards) if rewards else None,
    }
