"""CPU kernels (Numba): batch-invariant products, paged attention, adapters, norms and gates; and their backend."""

from __future__ import annotations

import numba

from server.model.backends.kernel_cache import find_cache

if (_folder := find_cache().folder) is not None:
    numba.config.CACHE_DIR = str(_folder)  # else Numba looks for a place of its own
