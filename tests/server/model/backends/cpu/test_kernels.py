"""The two inner loops under all products: sums that no neighbour changes, and compiled code that is never stale."""

from __future__ import annotations

from pathlib import Path

import numba
import numpy as np
import pytest

from server.model.backends.cpu.loops import item_type
from server.model.backends.cpu.product import NO_PREFETCH, product
from server.model.backends.kernel_cache import digest, find_cache


def test_compiled_code_is_kept_by_the_digest_of_the_sources(tmp_path: Path) -> None:
    """Kernels are compiled to a folder that the text of all of them names: an edit of one is an edit of all."""
    assert Path(numba.config.CACHE_DIR).name == digest()
    assert find_cache(tmp_path).folder == tmp_path / "kernels" / digest()


def test_long_sums_keep_their_digits() -> None:
    """A sum of 40,000 products is within 1e-6 of the exact one: spans are summed apart, then added."""
    k, generator = 40_000, np.random.default_rng(0)
    x, w = generator.random((1, k), np.float32), generator.random((1, k, 16), np.float32)
    out, empty = np.empty((1, 16), np.float32), np.empty(0, np.float32)
    product(x, w, np.zeros(16, np.float32), empty, empty, out, 1, NO_PREFETCH, item_type(np.float32))
    wanted = x.astype(np.float64) @ w[0].astype(np.float64)
    assert (np.abs(out - wanted) <= 1e-6 * wanted).all()


@pytest.mark.parametrize("rows", [1, 6, 7, 16, 100])
def test_what_is_asked_for_changes_no_bit(rows: int) -> None:
    """A product gives the same while it asks for what is read afterwards: many, few, large, and nothing of it."""
    k, panels, generator = 40, 5, np.random.default_rng(0)
    x, w = generator.random((rows, k), np.float32), generator.random((panels, k, 16), np.float32)
    later, empty = np.zeros(2**16, np.uint8), np.empty(0, np.float32)
    found = []
    for sizes in ([], [64], [1, 0, 5000, 3], [100] * 99):
        prefetch_list = np.array([(later.ctypes.data, size) for size in sizes], np.int64).reshape(-1, 2)
        out = np.empty((rows, 16 * panels), np.float32)
        product(x, w, np.zeros(16 * panels, np.float32), empty, empty, out, 2, prefetch_list, item_type(np.float32))
        found.append(out)
    np.testing.assert_allclose(found[0], np.einsum("rk,pkc->rpc", x, w).reshape(rows, -1), rtol=1e-5)
    assert all((out == found[0]).all() for out in found)
