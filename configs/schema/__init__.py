"""The one config schema of kdflow, one file per section, `run.py` at the root."""
