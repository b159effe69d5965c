"""Errors at loading a base."""

from __future__ import annotations


class UnsupportedBaseError(Exception):
    """The base does something that this server cannot do rightly; the sentence says what."""


class FusedPartError(RuntimeError):
    """A part of the model was recognised, and our own code failed to compute it: a bug or a broken installation."""
