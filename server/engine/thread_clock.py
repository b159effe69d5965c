"""A monotonic clock for the calling thread that excludes run-queue delay (runnable but not on a core)."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

# Of the thread that opens it: nanoseconds on a core, nanoseconds runnable but not on a core, number of time slices.
SCHEDSTAT = Path("/proc/thread-self/schedstat")


def thread_clock() -> Callable[[], float]:
    """Return a clock for the calling thread, in seconds, that stands still while the thread is runnable without a core.

    It runs while the thread computes, and while it waits for a lock, a disk or a device. If the system does not report
    run-queue delay (Linux does), it is the monotonic clock.
    """
    try:
        descriptor = os.open(SCHEDSTAT, os.O_RDONLY)
    except OSError:
        return time.monotonic
    read, buffer = ctypes.PyDLL(None).pread, ctypes.create_string_buffer(64)  # unlike os.pread it keeps the GIL
    read.argtypes, read.restype = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long), ctypes.c_ssize_t

    def delay_ns() -> int:
        size = read(descriptor, buffer, len(buffer), 0)
        return int(buffer.raw[:size].split()[1])

    def clock() -> float:
        before = delay_ns()
        while True:  # a core may be lost at the end of a system call: both readings must be of the same moment
            now, after = time.monotonic(), delay_ns()
            if after == before:
                return now - 1e-9 * after
            before = after

    return clock
