"""Stores of artifacts by digest: a directory or a bucket."""
