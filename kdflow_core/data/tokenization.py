"""The tokenize stage: sources in, examples out, everything dropped counted by reason.

Selection (`max_samples`, blending weights) and the split go by a hash of the content, so adding
samples moves none of the others, and equal samples land on the same side of the split.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from configs.schema.data import DataConfig, Source
from kdflow_core.contracts import Example, Reporter, TokenSequence
from kdflow_core.data.conversations import Conversation, SampleError, parse_row
from kdflow_core.data.rendering import Renderer
from kdflow_core.data.sources import iterate_rows
from kdflow_core.errors import DataError

Split = Literal["train", "heldout"]
MALFORMED = ("malformed", "missing_column", "bad_message")
HASH_SPAN = 2**64


@dataclass
class Tally:
    """Samples read and dropped, by source and reason, and an example of each reason."""

    read: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    first_detail: dict[str, str] = field(default_factory=dict)

    def drop(self, source: str, error: SampleError) -> None:
        """Count a dropped sample."""
        self.dropped.setdefault(source, Counter())[error.reason] += 1
        self.first_detail.setdefault(error.reason, str(error))


def content_hash(conversation: Conversation, seed: int) -> int:
    """A uniform 64-bit number from the sample's content."""
    data = f"{seed}\0{conversation.text}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def split_of(hashed: int, heldout_fraction: float) -> Split:
    """Which split a content hash falls into."""
    return "heldout" if hashed / HASH_SPAN < heldout_fraction else "train"


def tokenize(
    *,
    config: DataConfig,
    seed: int,
    student: Renderer,
    teacher: Renderer,
    max_teacher_length: int,
    max_student_length: int,
    reporter: Reporter,
    tally: Tally,
) -> Iterator[tuple[Split, Example]]:
    """Examples with their split, one by one; counts go to `tally`.

    Where both models render alike, give the same renderer twice: it then renders once.

    Raises:
        DataError: a source cannot be read, too many samples are malformed, or none are left.
    """
    names = config.source_names
    limits = _selection_thresholds(config, seed)
    kept = Counter[str]()
    for source, name, limit in zip(config.sources, names, limits, strict=True):
        for conversation in _conversations(source, name, tally):
            hashed = content_hash(conversation, seed + 1)
            if hashed > limit:
                continue
            try:
                example = _render(conversation, name, student, teacher)
                _check_length(example.student, min(config.max_length, max_student_length))
                _check_length(example.teacher, min(config.max_length, max_teacher_length))
            except SampleError as error:
                tally.drop(name, error)
                continue
            split = split_of(content_hash(conversation, seed), config.heldout_fraction)
            kept[split] += 1
            yield split, example
            reporter.progress(done=kept.total(), total=0, unit="samples", detail=name)
        _refuse_malformed(name, tally, config.max_malformed_fraction)
    _refuse_empty(kept, tally, config)


def _selection_thresholds(config: DataConfig, seed: int) -> list[int]:
    """Per source, the largest content hash that is kept (the selection takes the lowest)."""
    weighted = config.sources[0].weight is not None
    limited = config.max_samples is not None or any(s.max_samples for s in config.sources)
    if not weighted and not limited:
        return [HASH_SPAN] * len(config.sources)
    hashes = []
    for source, name in zip(config.sources, config.source_names, strict=True):
        conversations = _conversations(source, name, Tally())
        all_hashes = (content_hash(c, seed + 1) for c in conversations)
        if source.max_samples is None:
            hashes.append(sorted(all_hashes))
        else:
            hashes.append(heapq.nsmallest(source.max_samples, all_hashes))
    counts = blend_counts(
        available=[len(h) for h in hashes],
        weights=[s.weight for s in config.sources],
        max_samples=config.max_samples,
    )
    return [h[n - 1] if n else -1 for h, n in zip(hashes, counts, strict=True)]


def blend_counts(
    *, available: list[int], weights: list[float | None], max_samples: int | None
) -> list[int]:
    """How many samples to take of each source, none twice.

    With weights, the shares are exact and the scarcest source limits the total; without, each
    source contributes in proportion to its size.
    """
    total = sum(available)
    if total == 0:
        return [0] * len(available)
    given = [w if w is not None else n / total for w, n in zip(weights, available, strict=True)]
    shares = [w / sum(given) for w in given]
    total = min(int(n / share) for n, share in zip(available, shares, strict=True) if share)
    total = total if max_samples is None else min(total, max_samples)
    # Largest remainders, so that the counts add up to the total.
    exact = [share * total for share in shares]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return [min(count, n) for count, n in zip(counts, available, strict=True)]


def _conversations(source: Source, name: str, tally: Tally) -> Iterator[Conversation]:
    for row in iterate_rows(source):
        tally.read[name] += 1
        try:
            if isinstance(row, SampleError):
                raise row
            yield parse_row(row, layout=source.layout, columns=source.columns)
        except SampleError as error:
            tally.drop(name, error)


def _render(
    conversation: Conversation, source: str, student: Renderer, teacher: Renderer
) -> Example:
    student_tokens = student.render(conversation)
    teacher_tokens = student_tokens if teacher is student else teacher.render(conversation)
    if not np.array_equal(student_tokens.target_ids_N, teacher_tokens.target_ids_N):
        raise SampleError(
            "templates_disagree",
            "the chat templates of student and teacher supervise different tokens for the same "
            "answer; give both the same template, or arguments that render answers alike",
        )
    if not student_tokens.supervised_T.any():
        raise SampleError("empty", "no supervised token")
    return Example(
        source=source,
        student=student_tokens,
        teacher=teacher_tokens,
        answer=conversation.answer,
    )


def _check_length(tokens: TokenSequence, limit: int) -> None:
    length = len(tokens.ids_T)
    if length > limit:
        raise SampleError("too_long", f"a sample has {length} tokens, the limit is {limit}")


def _refuse_malformed(name: str, tally: Tally, tolerated: float) -> None:
    dropped = tally.dropped.get(name, Counter())
    malformed = sum(dropped[reason] for reason in MALFORMED)
    if malformed > tolerated * tally.read[name]:
        reason = next(r for r in MALFORMED if dropped[r])
        raise DataError(
            f"{malformed} of {tally.read[name]} samples of '{name}' cannot be used; the first: "
            f"{tally.first_detail[reason]}. Mend the data, or raise data.max_malformed_fraction "
            f"(now {tolerated}) to drop and count them"
        )


def _refuse_empty(kept: Counter[str], tally: Tally, config: DataConfig) -> None:
    reasons = {s: dict(c) for s, c in tally.dropped.items()}
    details = "; ".join(f"{r}: {d}" for r, d in tally.first_detail.items())
    if not kept.total():
        raise DataError(
            f"no sample is left of {tally.read.total()} read from "
            f"{', '.join(config.source_names)}; dropped: {reasons or 'none'}"
            f"{details and '. ' + details}"
        )
    for split in ("train", "heldout"):
        if not kept[split]:
            raise DataError(
                f"the {split} split is empty ({kept.total()} samples in all, dropped: "
                f"{reasons or 'none'}); change data.heldout_fraction (now "
                f"{config.heldout_fraction}) or give more data"
            )
