"""The training companion: it makes the artifacts that the server consumes."""
