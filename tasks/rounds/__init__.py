"""On-policy rounds as the flow sees them: processes, tasks, and what is kept."""
