"""Between flows and compute: the stages of a run, a room for each subject (see the README)."""
