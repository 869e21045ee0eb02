"""Models that answer prompts: token ids in, token ids out."""
