"""Threads of all kernels, and what the compiler may assume.

Numba must share torch's OpenMP, so torch is imported first. `FASTMATH` allows reassociation (a sum cannot be vectorised
without) but not the assumption that there are no infinities or NaNs: masks need the former, the refusal of broken
adapters the latter.
"""

from __future__ import annotations

from threading import Thread

import numba
import torch

numba.config.THREADING_LAYER = "omp"
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}


def set_num_threads(num_threads: int) -> None:
    """Give torch and Numba the same number of threads."""
    torch.set_num_threads(num_threads)
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))


@numba.njit(cache=True)
def _nothing():
    """Do nothing: the smallest kernel."""


def wake() -> None:
    """Begin in a thread what comes before any kernel's first call: Numba registers all that kernels may use.

    That is Python, 0.3 s of it. Who calls a kernel meanwhile waits for it.
    """
    Thread(target=_nothing, name="wake", daemon=True).start()
