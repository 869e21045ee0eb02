"""How much of what a run would ask its teacher the store knows from other runs.

Dimensions: N sequences.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from configs.schema.run import RunConfig
from storage.states.reader import HiddenStateReader
from storage.tokens import TokenTable
from tasks.stages.identity import StageIdentity, find, open_store
from tasks.stages.same_teacher import states_of_same_teacher
from tasks.stages.slices import SPLITS


@dataclass(frozen=True, kw_only=True)
class KnownStates:
    """Shares of the distinct sequences: of their `tokens`, for which the teacher is not asked; and
    of their `rows`, which are there in the run's own codec and take no room again.
    """

    tokens: float = 0.0
    rows: float = 0.0


NOTHING_KNOWN = KnownStates()


def known_states(run: RunConfig, plan: Mapping[str, StageIdentity]) -> KnownStates:
    """What other artifacts of the run's own teacher hold of the states that its plan is to store.
    Those shards are taken over, or their rows copied (see `storage.states.borrowing`).
    """
    extract = plan.get("extract")
    made = {identity.output: identity for identity in plan.values()}
    tokens = find(run, made.get("answers", made["tokens"]))
    if extract is None or tokens is None or run.stores_log_probs:
        return NOTHING_KNOWN
    store, codec = open_store(run), run.storage.codec
    folder = store.local_copy(tokens)
    tables = [TokenTable(folder / f"{split}.arrow") for split in SPLITS]
    digests_N, first = np.unique(
        np.concatenate([table.digests() for table in tables]), axis=0, return_index=True
    )
    tokens_N = np.concatenate([table.lengths("teacher") for table in tables])[first]
    rows_N = np.concatenate([table.supervised_counts("teacher") for table in tables])[first]

    def held(of_codec: str | None) -> np.ndarray:
        held_N = np.zeros(len(digests_N), bool)
        for manifest in states_of_same_teacher(store, extract, of_codec):
            ref = store.find(manifest.kind, manifest.digest)
            if ref is not None:
                reader = HiddenStateReader(store=store, ref=ref, cache_bytes=0)
                held_N |= reader.holds(digests_N)
        return held_N

    same_N = held(codec)
    known_N = same_N | held(None)
    return KnownStates(
        tokens=float(tokens_N[known_N].sum() / tokens_N.sum()),
        rows=float(rows_N[same_N].sum() / rows_N.sum()),
    )
