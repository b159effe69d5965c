"""A thread's own time: what it computes and what it waits for, and not that in which others have all the cores."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

# Of the thread that opens it: nanoseconds on a core, nanoseconds in which it was ready and had none, its turns.
SCHEDSTAT = Path("/proc/thread-self/schedstat")


def thread_clock() -> Callable[[], float]:
    """A clock of the calling thread, in seconds, that stands still while the thread is ready and has no core.

    It goes on while the thread computes, and while it waits for a lock, a disk, a device. Where the system does not say
    when a thread had no core (Linux does), it is the monotonic clock.
    """
    try:
        descriptor = os.open(SCHEDSTAT, os.O_RDONLY)
    except OSError:
        return time.monotonic
    read, said = ctypes.PyDLL(None).pread, ctypes.create_string_buffer(64)  # unlike os.pread it keeps Python's lock
    read.argtypes, read.restype = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long), ctypes.c_ssize_t

    def without_core() -> int:
        size = read(descriptor, said, len(said), 0)
        return int(said.raw[:size].split()[1])

    def clock() -> float:
        before = without_core()
        while True:  # whoever loses its core loses it at the end of a system call: the two must be of one moment
            now, after = time.monotonic(), without_core()
            if after == before:
                return now - 1e-9 * after
            before = after

    return clock
