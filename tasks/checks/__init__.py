"""What can be known before a run starts, and whether what is stored is whole."""
