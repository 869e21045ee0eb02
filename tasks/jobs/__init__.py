"""What the ranks do: the job of each stage, and the hosts of on-policy rounds.

The only modules that see both the core and the store. They are loaded by name, inside the ranks.
"""
