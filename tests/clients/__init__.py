"""Requests of clients that others wrote, recorded by running them, and replayed against the server."""
