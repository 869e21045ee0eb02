"""Log-probabilities by digest: what goes in comes out, whatever bytes a digest has."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.errors import RowsMismatchError
from storage.log_probs import LogProbs, write_log_probs

# Digests whose first or last bytes are zero, as one in 256 is, and that share their beginning.
DIGESTS = st.lists(st.sampled_from([0, 1, 255]), min_size=16, max_size=16).map(bytes)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    counts=st.dictionaries(DIGESTS, st.integers(0, 5), max_size=12),
    absent=DIGESTS,
    seed=st.integers(0, 2**31),
)
def test_round_trip(tmp_path: Path, counts: dict[bytes, int], absent: bytes, seed: int) -> None:
    digests = sorted(counts)
    num_rows = np.array([counts[digest] for digest in digests], np.int32)
    log_prob_M = np.random.default_rng(seed).normal(size=num_rows.sum()).astype(np.float32)
    packed = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
    write_log_probs(tmp_path / "log_probs.arrow", packed, num_rows, log_prob_M)

    read = LogProbs(tmp_path / "log_probs.arrow")
    parts = np.split(log_prob_M, np.cumsum(num_rows)[:-1]) if digests else []
    for digest, part_N in zip(digests, parts, strict=True):
        np.testing.assert_array_equal(read.of(digest, len(part_N)), part_N)
        with pytest.raises(RowsMismatchError, match="run the score-tokens stage again"):
            read.of(digest, len(part_N) + 1)
    if absent not in counts:
        with pytest.raises(RowsMismatchError, match="no log-probabilities"):
            read.of(absent, 1)
