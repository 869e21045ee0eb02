"""From raw rows to supervised token sequences."""
