"""How a stage is run: its Prefect task and cache, the lease, the ranks, their progress."""
