"""How long ranks wait for one another."""

from datetime import timedelta

# As long as the others work: who watches the ranks ends those that stand still
# (`stall_timeout_s`). NCCL would give up after 10 minutes, and a large model takes longer to write.
PATIENCE = timedelta(days=7)
