"""How much of the student's text a teacher with another tokenizer says something about."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdflow_core.contracts import Example


@dataclass(kw_only=True)
class Coverage:
    """Supervised tokens of the student; those that begin where one of the teacher's does (`pairs`);
    the shortest runs of tokens that spell the same on both sides (`groups`), and those of them that
    are one token on each side.
    """

    tokens: int = 0
    pairs: int = 0
    groups: int = 0
    one_to_one: int = 0

    def add(self, example: "Example", view: str) -> None:
        """Count a sample, as the teacher of a view reads it."""
        alignment = example.alignments[view]
        sizes_S2 = alignment.spans_S4[:, 1::2] - alignment.spans_S4[:, ::2]
        self.tokens += len(example.student.target_positions_N)
        self.pairs += len(alignment.pairs_P2)
        self.groups += len(alignment.spans_S4)
        self.one_to_one += int((sizes_S2 == 1).all(1).sum())


def summary(by_source: Mapping[str, Coverage]) -> str:
    """One line on all sources."""
    names = [field.name for field in fields(Coverage)]
    total = Coverage(**{n: sum(getattr(own, n) for own in by_source.values()) for n in names})
    share = total.pairs / max(1, total.tokens)
    return (
        f"{share:.1%} of the student's {total.tokens:,} supervised tokens begin "
        f"where one of the teacher's does; {total.groups:,} runs of tokens spell the same, "
        f"{total.one_to_one:,} of them one token on each side"
    )


def from_plain(counts: Mapping[str, Mapping[str, int]]) -> dict[str, Coverage]:
    """The coverage by source, from what `plain` has made of it."""
    return {name: Coverage(**own) for name, own in counts.items()}


def plain(by_source: Mapping[str, Coverage]) -> dict[str, dict[str, int]]:
    """The counts as plain JSON values."""
    return {name: asdict(own) for name, own in by_source.items()}
