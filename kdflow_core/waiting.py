"""How long ranks wait for one another."""

from datetime import timedelta

# NCCL would give up after 10 minutes, and a large model takes longer to write. A launcher ends
# ranks that stand still (`stall_timeout_s`), so that its ranks may wait as long as others work.
PATIENCE = timedelta(days=7)
UNWATCHED = timedelta(hours=2)  # of ranks that something else has started
