"""Errors of a base that cannot be served."""

from __future__ import annotations


class UnsupportedBaseError(Exception):
    """The base does something that this server cannot do rightly; the sentence says what."""
