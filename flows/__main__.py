"""`python -m flows` is the command `kdflow`."""

from flows.cli import main

main()
