"""The training loop, written against the protocols of `contracts`."""
