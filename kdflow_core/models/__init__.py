"""Models on disk: loading, vocabularies, output heads, conversion."""
