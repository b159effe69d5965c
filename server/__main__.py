"""`python -m server` is `manyhats`."""

from server.cli.main import main

main()
