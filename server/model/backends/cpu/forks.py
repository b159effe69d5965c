"""Kernels in a process that was forked from the one that loaded the base."""

from __future__ import annotations

import os

from numba.np.ufunc import parallel


class LaunchedThreads:
    """Knows in which process Numba has told OpenMP to begin; in a fork of that one its loops would not run at all."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def renew(self) -> None:
        """Let Numba begin anew, with the next look at its threads, if this process was forked since it began."""
        if self._pid != os.getpid():
            self._pid, parallel._is_initialized = os.getpid(), False
