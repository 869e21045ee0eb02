"""Teacher engines: token ids in, post-norm hidden states of the supervised rows out."""
