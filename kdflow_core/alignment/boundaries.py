"""Where two tokenizations of the same bytes begin and end tokens together.

Dimensions: N and M tokens of the two sides, P pairs, S groups.
"""

from typing import NamedTuple

import numpy as np


class Common(NamedTuple):
    """`pairs_P2` are tokens of both sides that begin at the same byte: what stands before them is
    the same text. `groups_S4` are the shortest runs of tokens on both sides that spell the same
    bytes: begin and end on the one side, begin and end on the other. Both are int32.
    """

    pairs_P2: np.ndarray
    groups_S4: np.ndarray


def common_boundaries(own_N: np.ndarray, other_M: np.ndarray) -> Common:
    """The pairs and groups of two sides, from the bytes of each of their tokens.

    Both spell the same bytes in all. A token without bytes begins nothing: it belongs to the group
    of the token behind it, or of the last one.
    """
    if int(own_N.sum()) != int(other_M.sum()):
        raise ValueError(f"{int(own_N.sum())} bytes on one side, {int(other_M.sum())} on the other")
    own, other = _filled(own_N), _filled(other_M)
    own_at, other_at = _begins(own_N, own), _begins(other_M, other)
    _, i, j = np.intersect1d(own_at, other_at, assume_unique=True, return_indices=True)
    pairs_P2 = np.stack([own[i], other[j]], axis=1).astype(np.int32)
    own_edges, other_edges = _edges(own, i, len(own_N)), _edges(other, j, len(other_M))
    columns = (own_edges[:-1], own_edges[1:], other_edges[:-1], other_edges[1:])
    groups_S4 = np.stack(columns, axis=1).astype(np.int32)
    return Common(pairs_P2, groups_S4)


def _filled(lengths: np.ndarray) -> np.ndarray:
    """The tokens that have bytes."""
    return np.flatnonzero(lengths)


def _begins(lengths: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """The first byte of each of them."""
    begins: np.ndarray = (np.cumsum(lengths, dtype=np.int64) - lengths)[filled]
    return begins


def _edges(filled: np.ndarray, chosen: np.ndarray, count: int) -> np.ndarray:
    """The tokens that groups begin with, and behind the last one."""
    if not len(chosen):
        return np.zeros(1, np.int64)
    # The tokens without bytes before a group's first one are part of it.
    before = np.where(chosen > 0, filled[chosen - 1] + 1, 0)
    return np.concatenate([before, [count]])
