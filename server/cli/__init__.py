"""The command line: serve, keys and tasks."""
