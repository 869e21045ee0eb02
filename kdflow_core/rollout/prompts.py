"""Which prompts a round has, a pure function of seed and round; and who answers which."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np


def round_prompts(
    *,
    source: np.ndarray,
    names: Sequence[str],
    weights: Mapping[str, float] | None,
    count: int,
    number: int,
    seed: int,
) -> list[int]:
    """The training examples whose prompts round `number` (from 1 on) takes.

    `source` is the number of each example's data source, in `names`. With `weights`, every prompt's
    source is drawn by them; each source's examples come in random order, all of them before any
    comes again. A source without a weight has none.
    """
    if weights is None:
        queues = [_endless(np.arange(len(source)), [seed, 0])]
        odds = np.ones(1)
    else:
        queues = [_endless(np.flatnonzero(source == k), [seed, 1 + k]) for k in range(len(names))]
        given = np.array([weights.get(name, 0.0) for name in names])
        odds = given / given.sum()
    chosen: list[int] = []
    for round_number in range(1, number + 1):  # the queues have moved on with every round before
        drawn = np.random.default_rng([seed, round_number]).choice(len(queues), count, p=odds)
        chosen = [next(queues[k]) for k in drawn]
    return chosen


def share_answers(costs: Sequence[int], *, together: int, engines: int) -> list[list[int]]:
    """The places of the answers that each engine gives, ascending: `together` in a row go to one,
    the dearest first to the one that has least.
    """
    units = [range(i, min(i + together, len(costs))) for i in range(0, len(costs), together)]
    shares: list[list[int]] = [[] for _ in range(engines)]
    loads = [0] * engines
    for unit in sorted(units, key=lambda unit: -sum(costs[i] for i in unit)):
        least = loads.index(min(loads))
        shares[least] += unit
        loads[least] += sum(costs[i] for i in unit)
    return [sorted(share) for share in shares]


def _endless(members: np.ndarray, seed: list[int]) -> Iterator[int]:
    for epoch in range(2**31):
        yield from (int(i) for i in np.random.default_rng([*seed, epoch]).permutation(members))
