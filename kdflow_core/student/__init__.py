"""The student: sharding, optimization, checkpoints, export."""
