"""A thread's own time: what it computes and what it waits for, and not that in which others have all the cores."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

# Of the thread that opens it: nanoseconds on a core, nanoseconds in which it was ready and had none, its turns.
TURNS = Path("/proc/thread-self/schedstat")


def own_time() -> Callable[[], float]:
    """A clock of the calling thread, in seconds, that stands still while the thread is ready and has no core.

    It goes on while the thread computes, and while it waits for a lock, a disk, a device. Where the system does not say
    when a thread had no core (Linux does), it is the monotonic clock.
    """
    try:
        descriptor = os.open(TURNS, os.O_RDONLY)
    except OSError:
        return time.monotonic
    read, said = ctypes.PyDLL(None).pread, ctypes.create_string_buffer(64)  # unlike os.pread it keeps Python's lock
    read.argtypes, read.restype = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long), ctypes.c_ssize_t

    def clock() -> float:
        size = read(descriptor, said, len(said), 0)
        return time.monotonic() - 1e-9 * int(said.raw[:size].split()[1])

    return clock
