"""Content-addressed artifacts, the hidden-state store in zarr, and byte access over fsspec."""
