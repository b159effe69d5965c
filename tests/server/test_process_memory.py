"""Garbage while loading, and after it."""

from __future__ import annotations

import gc

import pytest

from server import process_memory


def test_loading_looks_for_no_garbage_and_leaves_what_is_there_alone() -> None:
    """Loading collects no garbage; afterwards all objects are frozen, also if loading failed."""
    before = gc.get_freeze_count()
    try:
        with pytest.raises(ValueError, match="no base"), process_memory.loading():
            assert not gc.isenabled()
            raise ValueError("no base")
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
