"""How this process's C library (glibc) keeps the memory of large blocks that are freed."""

import ctypes

# <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER = -1


def keep_large_blocks() -> None:
    """From now on, take every block from one heap that only grows.

    By default every large buffer goes back to the system when it is freed, and the page faults of
    taking it again cost a good part of a training step on a CPU, where the loss takes chunks of
    logits. Not for a rank of several: layers are whole in it for a moment each, and the activations
    that come to stay between them keep their places from being used again. Without glibc, nothing
    changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, NEVER)
        mallopt(M_TOP_PAD, 2**29)
