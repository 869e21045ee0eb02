"""One command that tries everything on a device, with models made on the spot."""
