"""`python -m server` is `manyhats`."""

from server.cli import main

main()
