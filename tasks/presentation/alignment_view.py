"""Aligned samples for people: both sides' tokens, with their common boundaries."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema.models import PretrainedModel
from configs.schema.run import RunConfig
from kdflow_core.alignment.token_bytes import TokenBytes, token_bytes
from kdflow_core.alignment.translation import SIDES, Side
from kdflow_core.errors import DataError
from kdflow_core.models.folders import resolve_folder
from kdflow_core.models.tokenizers import load_tokenizer
from storage.tokens import TokenTable
from tasks.stages.identity import StageIdentity, find, open_store
from tasks.stages.planning import plan_stages
from tasks.stages.slices import Split

WIDTH = 96


@dataclass(frozen=True, kw_only=True)
class AlignedSample:
    """A sample's spans as text, student and teacher; `pairs` of the student's `tokens` begin where
    one of the teacher's does.
    """

    source: str
    tokens: int
    pairs: int
    spans: tuple[tuple[str, str], ...]


def aligned_samples(run: RunConfig, split: Split, count: int) -> list[AlignedSample]:
    """The first samples of a split. Raises DataError where there are none, or nothing to align."""
    plan = plan_stages(run)
    ref = find(run, plan["tokenize"])
    if ref is None:
        raise DataError(f"{run.name} has no tokens yet: run it first, with the same overrides")
    table = TokenTable(open_store(run).local_copy(ref) / f"{split}.arrow")
    bytes_of = {side: token_bytes(load_tokenizer(_folder(run, plan, side)), side) for side in SIDES}
    return [_sample(table[i], bytes_of, run) for i in range(min(count, len(table)))]


def _folder(run: RunConfig, plan: Mapping[str, StageIdentity], side: Side) -> Path:
    """A model's folder. Raises DataError for one that its stage has not made yet."""
    model = run.teacher.model if side == "teacher" else run.student.model
    if isinstance(model, PretrainedModel):
        return resolve_folder(model.path, model.revision, weights=False)
    made = next((i for i in plan.values() if i.output == f"{side}_model"), None)
    ref = None if made is None else find(run, made)
    if ref is None:
        raise DataError(f"the {side}'s model is not made yet: run {run.name} first")
    return open_store(run).local_copy(ref)


def _sample(
    row: Mapping[str, Any], bytes_of: Mapping[Side, TokenBytes], run: RunConfig
) -> AlignedSample:
    if row["teacher_pairs"] is None:
        raise DataError(
            f"student and teacher of {run.name} have one vocabulary, and are compared token by "
            "token: there is no alignment to show"
        )
    targets = {side: row[f"{side}_ids"][row[f"{side}_supervised"].astype(bool)] for side in SIDES}
    spans = [
        (
            _spelled(targets["student"][a:b], bytes_of["student"]),
            _spelled(targets["teacher"][c:d], bytes_of["teacher"]),
        )
        for a, b, c, d in row["teacher_spans"].reshape(-1, 4).tolist()
    ]
    return AlignedSample(
        source=row["source"],
        tokens=len(targets["student"]),
        pairs=len(row["teacher_pairs"]) // 2,
        spans=tuple(spans),
    )


def _spelled(ids: np.ndarray, tokens: TokenBytes) -> str:
    """Tokens with a dot between them; one that stands for no text ends a turn."""
    texts = [tokens.spelled[int(i)].decode(errors="replace") or "END" for i in ids]
    return "\u00b7".join(text.replace("\n", "\\n").replace("\t", "\\t") for text in texts)


def two_rows(spans: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Both sides' tokens under each other, in lines of about `WIDTH` characters."""
    rows = ["student \u2502", "teacher \u2502"]
    for span in spans:
        width = max(map(len, span))
        if len(rows[0]) + width > WIDTH and len(rows[0]) > len("student  "):
            yield from rows
            rows = ["        \u2502", "        \u2502"]
        rows = [f"{row}{text:<{width}}\u2502" for row, text in zip(rows, span, strict=True)]
    yield from rows
