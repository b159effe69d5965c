"""What all kernels share: their threads, and what the compiler may assume.

Numba must share torch's OpenMP, so torch is imported first. `FASTMATH` allows reassociation (a sum cannot be vectorised
without) but not the assumption that there are no infinities or NaNs: masks need the former, the refusal of broken
adapters the latter.
"""

from __future__ import annotations

import numba
import torch

numba.config.THREADING_LAYER = "omp"
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}


def set_num_threads(num_threads: int) -> None:
    """Give torch and Numba the same number of threads."""
    torch.set_num_threads(num_threads)
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
