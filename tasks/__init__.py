"""Between flows and compute: stage identities, caching, worker launch, wiring."""
