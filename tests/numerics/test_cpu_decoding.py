"""Attention of many requests at once while decoding, against softmax in float64, one by one."""

import warnings
from typing import Any

import pytest
import torch

HEADS, KV_HEADS, HEAD_SIZE, REQUESTS, CACHE = 6, 3, 8, 7, 400


@pytest.fixture(scope="module")
def decode() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kdflow_core.sglang_runtime import cpu_decoding
    return cpu_decoding._decode


@pytest.mark.parametrize("window", [None, 4])
def test_every_request_attends_to_its_own_tokens(decode: Any, window: int | None) -> None:
    """Whatever lies in the cache behind them, and however their lengths differ."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 40, 3, 17, 2, 33, 9])
    places = torch.randperm(CACHE, generator=generator)
    k_cache, v_cache = (torch.full((CACHE, KV_HEADS, HEAD_SIZE), torch.nan) for _ in range(2))
    table, first = torch.zeros(REQUESTS + 2, 64, dtype=torch.int32), 0
    pool = torch.tensor([4, 0, 6, 1, 8, 2, 3])
    for request, length in zip(pool.tolist(), lengths.tolist(), strict=True):
        own = places[first : first + length]
        table[request, :length] = own.int()
        table[request, length:] = int(places[-1])  # what another one has left there
        for cache in (k_cache, v_cache):
            cache[own] = torch.randn(length, KV_HEADS, HEAD_SIZE, generator=generator)
        first += length
    query = torch.randn(REQUESTS, HEADS, HEAD_SIZE, generator=generator)
    found = decode(
        None,
        query,
        torch.empty_like(query),
        k_cache,
        v_cache,
        table,
        pool,
        lengths,
        scaling=0.3,
        enable_gqa=True,
        causal=False,
        sliding_window_size=window,
    )
    for row, (request, length) in enumerate(zip(pool.tolist(), lengths.tolist(), strict=True)):
        begin = 0 if window is None else max(0, length - 1 - window)
        own = table[request, begin:length].long()
        for head in range(HEADS):
            k, v = (c[own, head // (HEADS // KV_HEADS)].double() for c in (k_cache, v_cache))
            weights = (k @ query[row, head].double() * 0.3).softmax(-1)
            torch.testing.assert_close(found[row, head].double(), weights @ v, rtol=1e-5, atol=1e-6)
