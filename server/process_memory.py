"""Start-up memory: freeze long-lived objects out of the garbage collector and return freed pages to the OS."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Collect no garbage while the block runs, which saves a second; then freeze all objects that it leaves."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        trim()


def keep_imports() -> None:
    """Freeze the objects made so far, so that the collection at the end of loading skips them."""
    gc.freeze()


def trim() -> None:
    """Return freed pages to the OS, if the allocator (glibc's) keeps them."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)
