"""CPU kernels (Numba): batch-invariant products, paged attention, adapter primitives, norms and gates.

Rooms above call these where `supports` says so, and the slow twins in plain torch elsewhere.
"""

from __future__ import annotations

import numba
import torch

from server.model.backends.kernel_cache import find_cache

if (_folder := find_cache().folder) is not None:
    numba.config.CACHE_DIR = str(_folder)  # else Numba looks for a place of its own


def supports(device: str, dtype: torch.dtype) -> bool:
    """Tell whether these kernels serve activations of this type on this device; nothing else decides it."""
    return torch.device(device).type == "cpu" and dtype == torch.float32
