"""What is imported and loaded stays: it is not searched for garbage, and what loading freed goes back to the system."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Look for no garbage meanwhile, which takes a second of a start; and never again in what is there in the end."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        trim()


def keep_imports() -> None:
    """Leave what is there by now out of the search that loading ends with."""
    gc.freeze()


def trim() -> None:
    """Give what was freed back to the system, where the allocator (glibc's) keeps it."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)
