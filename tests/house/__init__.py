"""Tests over the source tree itself: docstrings, sizes, names, imports, and the built wheel."""
