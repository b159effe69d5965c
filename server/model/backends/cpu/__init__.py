"""CPU kernels (Numba): batch-invariant products, paged attention, adapters, norms and gates; and their backend."""

from __future__ import annotations

import atexit
import shutil
import tempfile

import numba

from server.model.backends.kernel_cache import find_cache

if (_folder := find_cache().folder) is not None:
    numba.config.CACHE_DIR = str(_folder)
else:  # Numba compiles nothing for the disk without a folder: this one ends with the process
    numba.config.CACHE_DIR = tempfile.mkdtemp(prefix="manyhats-kernels-")
    atexit.register(shutil.rmtree, numba.config.CACHE_DIR, ignore_errors=True)
