"""Held-out scores, as sums over the tokens of each sample, and the means that they give.

Loads no model library. Dimensions: S samples, C columns.
"""

import math
import sys
from dataclasses import dataclass

import numpy as np

from kdflow_core.eval.intervals import Ratio, mean_intervals

COMPARED = ("forward_kl", "reverse_kl", "agreement", "ce_model", "ce_teacher", "shared_mass")
COLUMNS = (*COMPARED, "ends_right")
COUNTS = ("compared", "tokens", "bytes", "ends")
SUMS = (*COLUMNS, *COUNTS)
# Means that samples give an interval to: the sums whose quotient they are.
RATIOS = {
    "forward_kl": ("forward_kl", "compared"),
    "reverse_kl": ("reverse_kl", "compared"),
    "agreement": ("agreement", "compared"),
    "cross_entropy": ("ce_model", "tokens"),
}


@dataclass(frozen=True, kw_only=True)
class DistributionScores:
    """Means over supervised tokens. KL in nats per token; agreement is the share of tokens with
    the teacher's top-1; the perplexity is of the text itself, in the model's own tokens, and
    `bits_per_byte` its cross-entropy by the bytes of the text: that compares models of different
    tokenizers. `end_accuracy` is the share of the `num_ends` ends of turns in the text at which the
    model would end the turn, too.

    Where tokens are aligned, KL and agreement are of classes of tokens, at `num_compared` of them,
    and `shared_mass` is the model's mean probability there of the tokens that both have (and of
    ends); the teacher's perplexity, of other tokens, is left out. Elsewhere the bytes are, and the
    shared mass.
    """

    num_tokens: int
    num_compared: int
    forward_kl: float
    reverse_kl: float
    agreement: float
    perplexity: float
    teacher_perplexity: float | None
    bits_per_byte: float | None
    num_ends: int
    end_accuracy: float | None
    shared_mass: float | None


@dataclass(frozen=True, kw_only=True)
class SampleSums:
    """What scores are means of, by sample: the digest of the student's sequence [S, 16], the data
    source, and sums [S, C] under the names of `SUMS`.
    """

    digests_S16: np.ndarray
    sources: list[str]
    sums_SC: np.ndarray

    def of(self, name: str) -> np.ndarray:
        """A column, [S]."""
        column: np.ndarray = self.sums_SC[:, SUMS.index(name)]
        return column

    def ratios(self, rows: np.ndarray) -> list[Ratio]:
        """The sums of some samples whose quotients `RATIOS` names, in its order."""
        return [(self.of(top)[rows], self.of(bottom)[rows]) for top, bottom in RATIOS.values()]

    def scores(self, *, aligned: bool) -> dict[str, DistributionScores]:
        """By source, and over all under the name `all`."""
        return {
            name: _scores(self.sums_SC[rows].sum(0), aligned=aligned)
            for name, rows in self._rows().items()
        }

    def intervals(self) -> dict[str, dict[str, list[float]]]:
        """By source, and over all, the 95 % intervals of the means that `RATIOS` names, where there
        are samples enough.
        """
        found: dict[str, dict[str, list[float]]] = {}
        for source, rows in self._rows().items():
            intervals = mean_intervals(self.ratios(rows))
            known = {n: list(own) for n, own in zip(RATIOS, intervals, strict=True) if own}
            if known:
                found[source] = known
        return found

    def _rows(self) -> dict[str, np.ndarray]:
        sources = np.array(self.sources)
        named = {name: sources == name for name in dict.fromkeys(self.sources)}
        return {"all": np.ones(len(sources), bool), **named} if named else {}


def _scores(total: np.ndarray, *, aligned: bool) -> DistributionScores:
    sums = dict(zip(SUMS, total.tolist(), strict=True))
    compared, tokens = max(1.0, sums["compared"]), sums["tokens"]
    teacher = None if aligned else _perplexity(sums["ce_teacher"] / compared)
    bits = sums["ce_model"] / math.log(2) / sums["bytes"] if sums["bytes"] else None
    return DistributionScores(
        num_tokens=int(tokens),
        num_compared=int(sums["compared"]),
        forward_kl=sums["forward_kl"] / compared,
        reverse_kl=sums["reverse_kl"] / compared,
        agreement=sums["agreement"] / compared,
        perplexity=_perplexity(sums["ce_model"] / tokens),
        teacher_perplexity=teacher,
        bits_per_byte=bits,
        num_ends=int(sums["ends"]),
        end_accuracy=sums["ends_right"] / sums["ends"] if sums["ends"] else None,
        shared_mass=sums["shared_mass"] / compared if aligned else None,
    )


def _perplexity(cross_entropy: float) -> float:
    """The perplexity of a mean cross-entropy in nats; infinite beyond what a float holds."""
    return math.exp(cross_entropy) if cross_entropy < math.log(sys.float_info.max) else math.inf
