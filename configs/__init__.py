"""Configuration of kdflow: strict schemas, the loader, and the recipes that ship with it."""
