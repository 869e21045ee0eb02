"""The log-probabilities that a teacher gives the tokens of sequences, by digest: one Arrow file.

Dimensions: S sequences, N tokens of one, M tokens of all.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from storage.digests import DIGEST_BYTES, Digests, digest_column
from storage.errors import RowsMismatchError, StoreCorruptError
from storage.store import disk_errors

SCHEMA = pa.schema([("digest", pa.binary(DIGEST_BYTES)), ("log_prob", pa.large_list(pa.float32()))])


def write_log_probs(
    path: Path, digests: np.ndarray, num_rows: np.ndarray, log_prob_M: np.ndarray
) -> None:
    """Write those of sequences, back to back: `digests` uint8 [S, 16], ascending; the tokens of
    each, `num_rows` [S]; and float32 [M], in nats.
    """
    offsets = np.concatenate([[0], np.cumsum(num_rows, dtype=np.int64)])
    columns = [
        digest_column(digests),
        pa.LargeListArray.from_arrays(offsets, pa.array(log_prob_M, pa.float32())),
    ]
    with (
        disk_errors(str(path)),
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        writer.write_batch(pa.record_batch(columns, schema=SCHEMA))


class LogProbs:
    """Such a file, mapped into memory. May be used by several threads.

    Raises StoreCorruptError for a file that is none.
    """

    def __init__(self, path: Path) -> None:
        try:
            with pa.memory_map(str(path)) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
        except pa.ArrowInvalid as error:
            raise StoreCorruptError(f"{path} is no file of log-probabilities: {error}") from error
        self._digests = Digests(batch.column("digest"))
        self._offsets = batch.column("log_prob").offsets.to_numpy()
        self._log_prob_M = batch.column("log_prob").values.to_numpy()

    def of(self, digest: bytes, count: int) -> np.ndarray:
        """Those of one sequence, float32 [N].

        Raises RowsMismatchError: there is no such sequence, or it has not `count` tokens.
        """
        place = self._digests.position(digest)
        if place is None:
            raise RowsMismatchError(
                f"no log-probabilities for the sequence with digest {digest.hex()}: its ids or its "
                "supervision mask differ from what the teacher saw; run the score-tokens stage "
                "again"
            )
        found_N = self._log_prob_M[self._offsets[place] : self._offsets[place + 1]]
        if len(found_N) != count:
            raise RowsMismatchError(
                f"{len(found_N)} log-probabilities for the {count} tokens of the sequence with "
                f"digest {digest.hex()}; run the score-tokens stage again"
            )
        return np.asarray(found_N)
