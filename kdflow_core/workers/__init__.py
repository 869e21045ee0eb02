"""Groups of rank processes that end together."""
