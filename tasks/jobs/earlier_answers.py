"""Answers that the same model has written to the same prompts for other data, in the same way: a
night with more prompts asks for what is new. A sampled answer is then the one that was drawn first.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from storage.artifact import ArtifactRef, Manifest
from storage.tokens import TokenTable
from tasks.jobs import parts
from tasks.jobs.earlier_tokens import MOST, MOST_READ, reading
from tasks.jobs.stage_run import StageRun
from tasks.stages.catalogue import CATALOGUE
from tasks.stages.slices import SPLITS, Split

GENERATE = CATALOGUE["generate"]
Row = Mapping[str, Any]
Known = tuple[bytes, int]  # the digests of a sample's views, and which of equal samples it is
Wanted = Callable[[Split, TokenTable], Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Held:
    """Where an answer stands."""

    table: TokenTable
    row: int

    def as_answer_of(self, own: Row) -> Row:
        """The answered row, of the data source and with the label of another one."""
        return {**self.table[self.row], "source": own["source"], "label": own["label"]}


class EarlierAnswers:
    """Answered rows of other artifacts."""

    def __init__(self) -> None:
        self._held: dict[Known, Held] = {}

    def add(self, before: TokenTable, rows: Sequence[int], answers: TokenTable) -> None:
        """Take in the answers to some rows of a table."""
        for known, row in zip(_known(before, rows), rows, strict=True):
            self._held.setdefault(known, Held(table=answers, row=row))

    def of(self, table: TokenTable, rows: Sequence[int]) -> dict[int, Held]:
        """Where the answers to some rows of a table are, for those that have been answered."""
        known = zip(rows, _known(table, rows), strict=True)
        return {row: self._held[own] for row, own in known if own in self._held}


def _known(table: TokenTable, rows: Sequence[int]) -> list[Known]:
    digests = [table.digests(view) for view in table.views]
    seen: Counter[bytes] = Counter()
    found = []
    for row in rows:
        sample = b"".join(own[row].tobytes() for own in digests)
        found.append((sample, seen[sample]))
        seen[sample] += 1
    return found


def earlier_answers(stage: StageRun, wanted: Wanted) -> EarlierAnswers:
    """What the store has, on all ranks alike; `wanted` are the rows of a split's table that are
    answered.
    """
    earlier = EarlierAnswers()
    for refs in parts.agreed(partial(_all_serving, stage)):
        folders = [stage.store.local_copy(ref) for ref in refs]
        for split in SPLITS:
            tokens, answers = (TokenTable(folder / f"{split}.arrow") for folder in folders)
            earlier.add(tokens, wanted(split, tokens), answers)
    return earlier


def _all_serving(stage: StageRun) -> list[tuple[ArtifactRef, ArtifactRef]]:
    manifests = stage.store.newest_manifests(GENERATE.kind, MOST)
    found = (refs for manifest in manifests if (refs := _serving(stage, manifest)) is not None)
    return list(islice(found, MOST_READ))


def _serving(stage: StageRun, manifest: Manifest) -> tuple[ArtifactRef, ArtifactRef] | None:
    """The tokens that an artifact was made of, and its answers, where they are of the stage's model
    and settings.
    """
    own, store = stage.spec.identity, stage.store
    changed = {name for name, made in own.inputs.items() if manifest.inputs.get(name) != made}
    if (
        changed != {"tokens"}
        or manifest.code_version != GENERATE.code_version
        or manifest.config != own.config
    ):
        return None
    mine = stage.spec.inputs["tokens"]
    tokens = store.find(mine.kind, manifest.inputs["tokens"])
    answers = store.find(manifest.kind, manifest.digest)
    if tokens is None or answers is None:
        return None
    before, now = (store.manifest(ref.kind, ref.digest) for ref in (tokens, mine))
    alike = reading(before.config, before.inputs) == reading(now.config, now.inputs)
    return (tokens, answers) if alike else None
