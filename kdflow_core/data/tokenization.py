"""The tokenize stage: sources in, examples out, everything dropped counted by reason.

Selection (`max_samples`, blending weights) goes by a hash of the content, the split by one of the
prompt: adding samples moves none of the others, and samples with the same prompt land on the same
side.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np

from configs.schema.data import DataConfig, Source
from kdflow_core.contracts import Alignment, Example, TokenSequence
from kdflow_core.data.conversations import Conversation, parse_row
from kdflow_core.data.known_samples import sample_key
from kdflow_core.data.many_cores import in_order
from kdflow_core.data.messages import SampleError
from kdflow_core.data.overlap import PromptOverlap, spoken_hash
from kdflow_core.data.rendering import Renderer
from kdflow_core.data.sources import RowFiles, iterate_rows
from kdflow_core.errors import DataError
from kdflow_core.sinks import Reporter

Split = Literal["train", "heldout"]
# What is dropped as a matter of course; a limit holds for every other reason.
EXPECTED = ("too_long", "blank_line")
HASH_SPAN = 2**64
# What a sample's canonical text may have beside its content: names of fields, brackets, escapes.
MARKUP_CHARACTERS = 100_000
# Samples that are kept of a source while it is read: some hundred megabytes.
MOST_HELD = 20_000


@dataclass
class Tally:
    """Samples read, those of them that are prompts alone, those held out because of a source that
    is, those that were known, and those dropped, by source and reason, with an example of each
    reason; fields that student's and teacher's templates leave out; and prompts of both splits.
    """

    read: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)
    withheld: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    first_detail: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, Counter[str]] = field(default_factory=dict)
    overlap: PromptOverlap = field(default_factory=PromptOverlap)

    def drop(self, source: str, error: SampleError) -> None:
        """Count a dropped sample."""
        self.dropped.setdefault(source, Counter())[error.reason] += 1
        self.first_detail.setdefault(error.reason, str(error))

    def take(self, source: str, rendered: "_Rendered") -> None:
        """Count what was rendered."""
        for side, found in rendered.ignored.items():
            if found:
                self.ignored.setdefault(side, Counter()).update(found)
        if rendered.example is None:
            self.drop(source, SampleError(rendered.reason, rendered.detail))
        else:
            self.prompts[source] += rendered.is_prompt
            self.withheld[source] += rendered.is_withheld
            self.known[source] += rendered.is_known
            self.overlap.add(rendered.split, rendered.prompt_hash)


@dataclass(frozen=True, kw_only=True)
class _Rendered:
    """What has become of a sample: an example, or the reason why it is dropped; whether it would
    have been trained on, if a held-out source did not have its prompt; what it is known by, and
    whether it was known.
    """

    example: Example | None = None
    split: Split = "train"
    key: bytes | None = None
    prompt_hash: int = 0
    is_prompt: bool = False
    is_withheld: bool = False
    is_known: bool = False
    reason: str = ""
    detail: str = ""
    ignored: dict[str, Counter[str]]


class Tokenized(NamedTuple):
    """An example, the split that it belongs to, and what its sample is known by (None: by nothing,
    and it is tokenized anew each time).
    """

    split: Split
    example: Example
    key: bytes | None


def unknown(key: bytes) -> Example | None:
    """No sample was tokenized before."""
    del key
    return None


class Aligner(Protocol):
    """What brings the tokens of two tokenizers together; see `kdflow_core.alignment`."""

    def as_both_read(self, text: str) -> str:
        """A text in the form that both cut."""
        ...

    def align(
        self, student: TokenSequence, teacher: TokenSequence, contents: Sequence[str]
    ) -> Alignment:
        """The alignment of one sample with these answers. Raises SampleError."""
        ...


@dataclass(frozen=True, kw_only=True)
class ViewReader:
    """How one model reads the samples: the longest sequence that it takes, in tokens; and what
    aligns its tokens with the student's, where they are others.
    """

    renderer: Renderer
    context_length: int
    aligner: Aligner | None = None


def text_hash(text: str, seed: int) -> int:
    """A uniform 64-bit number from a text."""
    data = f"{seed}\0{text}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def split_of(hashed: int, heldout_fraction: float) -> Split:
    """Which split a hash of a prompt falls into."""
    return "heldout" if hashed / HASH_SPAN < heldout_fraction else "train"


def tokenize(
    *,
    config: DataConfig,
    seed: int,
    files: RowFiles,
    readers: Mapping[str, ViewReader],
    reporter: Reporter,
    tally: Tally,
    cores: int = 1,
    known: Callable[[bytes], Example | None] = unknown,
) -> Iterator[Tokenized]:
    """Examples, one by one, the same whatever the number of `cores`; counts go to `tally`. Samples
    that are `known`, by their keys, are not rendered again.

    `readers` are by view, the student first. Where others render as it does, give the same renderer
    again: it then renders once. Those without an aligner have to supervise the student's tokens.

    Raises:
        DataError: a source cannot be read, too many samples are dropped, or none are left.
    """
    kept = Counter[str]()
    chosen = _chosen(config, seed, files, tally)
    withheld = _withheld_prompts(config, seed, files)
    for source, name, conversations in zip(
        config.sources, config.source_names, chosen, strict=True
    ):
        fraction = 1.0 if source.heldout else config.heldout_fraction

        def rendered(
            conversation: Conversation, source: str = name, fraction: float = fraction
        ) -> _Rendered:
            hashed = text_hash(conversation.prompt_text, seed)
            split = split_of(hashed, fraction)
            moved = split == "train" and hashed in withheld
            split, key = "heldout" if moved else split, sample_key(conversation, source)
            example = known(key)
            if example is None:
                found = _rendered(conversation, source, readers, config.max_length)
            else:
                found = _Rendered(example=example, is_known=True, ignored={})
            # A known sample does not tell what templates leave out of it.
            is_told = any(found.ignored.values())
            return replace(
                found,
                split=split,
                key=None if is_told else key,
                prompt_hash=spoken_hash(conversation.prompt_text),
                is_prompt=found.example is not None and conversation.lacks_answer,
                is_withheld=moved,
            )

        for found in in_order(rendered, iter(conversations), cores=cores):
            tally.take(name, found)
            if found.example is not None:
                kept[found.split] += 1
                yield Tokenized(found.split, found.example, found.key)
                reporter.progress(done=kept.total(), total=0, unit="samples", detail=name)
        _refuse_dropped(name, tally, config.max_malformed_fraction)
    _refuse_empty(kept, tally, config)


def _withheld_prompts(config: DataConfig, seed: int, files: RowFiles) -> frozenset[int]:
    """The hashes of the prompts of sources that are held out, which nobody is to train on."""
    return frozenset(
        text_hash(conversation.prompt_text, seed)
        for source, name in zip(config.sources, config.source_names, strict=True)
        if source.heldout
        for conversation in _conversations(config, source, name, files, Tally())
    )


class _Selection:
    """Whether samples of a source are taken: those with the lowest hashes of their content, and of
    equal samples at the limit as many as there is room for.
    """

    def __init__(self, hashes: list[int], seed: int) -> None:
        self._seed = seed
        self._limit = max(hashes, default=-1)
        self._room = hashes.count(self._limit)

    def __call__(self, conversation: Conversation) -> bool:
        hashed = text_hash(conversation.text, self._seed)
        if hashed == self._limit:
            self._room -= 1
            return self._room >= 0
        return hashed < self._limit


class _Lowest:
    """The samples of a source with the lowest hashes of their content, of equal ones the first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[int, int, Conversation]] = []  # the first is the next to go
        self.count = 0

    def add(self, conversation: Conversation, hashed: int) -> None:
        """Look at one more."""
        self.count += 1
        entry = (-hashed, -self.count, conversation)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        elif entry[:2] > self._heap[0][:2]:
            heapq.heapreplace(self._heap, entry)

    def take(self, count: int) -> list[Conversation]:
        """So many of them, in the source's order."""
        lowest = heapq.nlargest(count, self._heap, key=lambda entry: entry[:2])
        return [entry[2] for entry in sorted(lowest, key=lambda entry: -entry[1])]


def _chosen(
    config: DataConfig, seed: int, files: RowFiles, tally: Tally
) -> list[Iterable[Conversation]]:
    """Per source, what is taken of it, in its order; sources are counted in `tally` as they are
    read. Few samples of many are kept while their source is read; many are found by reading it
    twice.
    """
    weighted = config.trained_sources[0].weight is not None
    limits = [
        s.max_samples
        if s.heldout
        else min((n for n in (s.max_samples, config.max_samples) if n is not None), default=None)
        for s in config.sources
    ]
    if weighted or any(limits):
        if all(limit is not None and limit <= MOST_HELD for limit in limits):
            return _held(config, seed, files, tally, [limit or 0 for limit in limits])
        selections = _selections(config, seed, files)
    else:
        selections = [lambda _: True] * len(config.sources)
    return [
        filter(selected, _conversations(config, source, name, files, tally))
        for source, name, selected in zip(
            config.sources, config.source_names, selections, strict=True
        )
    ]


def _held(
    config: DataConfig, seed: int, files: RowFiles, tally: Tally, limits: Sequence[int]
) -> list[Iterable[Conversation]]:
    """The same, of sources that are read once."""
    sources = []
    for source, name, limit in zip(config.sources, config.source_names, limits, strict=True):
        lowest = _Lowest(limit)
        for conversation in _conversations(config, source, name, files, tally):
            lowest.add(conversation, text_hash(conversation.text, seed + 1))
        sources.append(lowest)
    counts = _counts(
        config,
        [
            own.count if s.max_samples is None else min(own.count, s.max_samples)
            for own, s in zip(sources, config.sources, strict=True)
        ],
    )
    return [own.take(count) for own, count in zip(sources, counts, strict=True)]


def _selections(
    config: DataConfig, seed: int, files: RowFiles
) -> list[Callable[[Conversation], bool]]:
    """Per source, whether a sample is taken of it."""
    hashes = []
    for source, name in zip(config.sources, config.source_names, strict=True):
        conversations = _conversations(config, source, name, files, Tally())
        all_hashes = (text_hash(c.text, seed + 1) for c in conversations)
        if source.max_samples is None:
            hashes.append(sorted(all_hashes))
        else:
            hashes.append(heapq.nsmallest(source.max_samples, all_hashes))
    counts = _counts(config, [len(h) for h in hashes])
    return [_Selection(h[:n], seed + 1) for h, n in zip(hashes, counts, strict=True)]


def _counts(config: DataConfig, available: Sequence[int]) -> list[int]:
    """How many samples to take of each source: all that are held out, the others blended."""
    blended = [place for place, source in enumerate(config.sources) if not source.heldout]
    counts = list(available)
    found = blend_counts(
        available=[available[place] for place in blended],
        weights=[config.sources[place].weight for place in blended],
        max_samples=config.max_samples,
    )
    for place, count in zip(blended, found, strict=True):
        counts[place] = count
    return counts


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


def _conversations(
    config: DataConfig, source: Source, name: str, files: RowFiles, tally: Tally
) -> Iterator[Conversation]:
    prompts = config.answers is not None
    for row in iterate_rows(source, files):
        tally.read[name] += 1
        try:
            if isinstance(row, SampleError):
                raise row
            yield parse_row(row, layout=source.layout, columns=source.columns, prompts=prompts)
        except SampleError as error:
            tally.drop(name, error)


def _rendered(
    conversation: Conversation,
    source: str,
    readers: Mapping[str, ViewReader],
    max_length: int,
) -> _Rendered:
    """What becomes of a sample."""
    for reader in readers.values():
        reader.renderer.ignored = Counter()
    try:
        example = _render(conversation, source, readers, max_length)
    except SampleError as error:
        return _Rendered(reason=error.reason, detail=str(error), ignored={})
    ignored = {view: reader.renderer.ignored for view, reader in readers.items()}
    return _Rendered(example=example, ignored=ignored)


def _render(
    conversation: Conversation,
    source: str,
    readers: Mapping[str, ViewReader],
    max_length: int,
) -> Example:
    """An example as student and teachers read it, each within its limit of tokens."""
    for reader in readers.values():
        if reader.aligner is not None:
            conversation = conversation.rewritten(reader.aligner.as_both_read)
    own = readers["student"].renderer
    views: dict[str, TokenSequence] = {}
    alignments: dict[str, Alignment] = {}
    for view, reader in readers.items():
        renderer, limit = reader.renderer, min(max_length, reader.context_length)
        # Before anything is rendered: a text of this length cannot have fewer tokens.
        if len(conversation.text) > limit * renderer.chat.longest_token + MARKUP_CHARACTERS:
            raise SampleError(
                "too_long",
                f"a sample has {len(conversation.text):,} characters, the limit is {limit} tokens",
            )
        same = bool(views) and renderer is own
        tokens = views["student"] if same else renderer.render(conversation)
        if len(tokens.ids_T) > limit:
            raise SampleError(
                "too_long", f"a sample has {len(tokens.ids_T)} tokens, the limit is {limit}"
            )
        views[view] = tokens
    student = views["student"]
    for view, reader in readers.items():
        if reader.aligner is not None:
            answers = own.learned_answers(conversation)
            alignments[view] = reader.aligner.align(student, views[view], answers)
        elif not np.array_equal(student.target_ids_N, views[view].target_ids_N):
            raise SampleError(
                "templates_disagree",
                f"the chat templates of student and {view} supervise different tokens for the same "
                "answer; give both the same template, or arguments that render answers alike",
            )
    if not conversation.lacks_answer and not student.supervised_T.any():
        raise SampleError("empty", "no supervised token")
    return Example(
        source=source,
        views=views,
        alignments=alignments,
        label=conversation.label,
    )


def _refuse_dropped(name: str, tally: Tally, tolerated: float) -> None:
    """Raises DataError where more than the tolerated share was dropped."""
    dropped = tally.dropped.get(name, Counter())
    counted = {reason: n for reason, n in dropped.items() if reason not in EXPECTED}
    if sum(counted.values()) > tolerated * tally.read[name]:
        reason = next(iter(counted))
        raise DataError(
            f"{sum(counted.values())} of {tally.read[name]} samples of '{name}' cannot be used "
            f"({', '.join(f'{r}: {n}' for r, n in counted.items())}); the first: "
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
            withheld = (
                f", held out for their prompts: {dict(+tally.withheld)}"
                if tally.withheld.total()
                else ""
            )
            raise DataError(
                f"the {split} split is empty ({kept.total()} samples in all, dropped: "
                f"{reasons or 'none'}{withheld}); change data.heldout_fraction (now "
                f"{config.heldout_fraction}) or give more data"
            )
