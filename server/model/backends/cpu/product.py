"""y = W x + b with the weight packed once: for any number of rows, in 32, 16 or 8 bits, arithmetic in fp32.

Columns of W lie in panels of 16; a thread takes its share of the panels, and walks each with six rows of x at a time.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from server.model.backends.cpu.loops import ROWS, Strides, multiply
from server.model.backends.cpu.vector import PANEL, at, copy

PREFETCH_OFFSET = 4096  # bytes: a product that streams its weight from memory is then as fast as from cache
LINE = 64  # bytes that memory gives at once
SPARE = 5  # quarters of what prefetching needs: it ends between panels
NO_PREFETCH = np.empty((0, 2), np.int64)
BLOCK = 96  # rows whose x stays in the second cache while all panels go by


@njit(inline="always")
def _total(prefetch_list, first, last):
    """Return the number of bytes in a part of a list."""
    num_bytes = 0
    for entry in range(first, last):
        num_bytes += prefetch_list[entry, 1]
    return num_bytes


@njit(inline="always")
def _scale(out, first_row, rows, first, last, scales, bias):
    """Finish sums of 8-bit weights, in place: columns [first, last) of some rows of out."""
    for r in range(first_row, first_row + rows):
        for c in range(first, last):
            out[r, c] = out[r, c] * scales[c] + bias[c]


@njit(parallel=True, cache=True)
def product(x, weight, start, scales, bias, out, threads, prefetch_list, item_type):
    """Write out [m, n] = x [m, k] @ weight + start, weight [panels, k, 16] as `weights` packs it, start [panels * 16].

    item_type is weight's. For 8 bits the sums are multiplied by scales [n], and then bias [n] is added; elsewhere both
    are empty. Meanwhile memory that is read afterwards is asked for: prefetch_list [e, 2] = (address, bytes), dealt to
    the threads in order. Many rows leave the way to memory idle.
    """
    m, k = x.shape
    n, size = out.shape[1], k * PANEL
    prefetch_offset = PREFETCH_OFFSET if m <= ROWS else size * weight.itemsize
    for thread in prange(threads):
        low, high = weight.shape[0] * thread // threads, weight.shape[0] * (thread + 1) // threads
        entry, last = len(prefetch_list) * thread // threads, len(prefetch_list) * (thread + 1) // threads
        num_bytes = _total(prefetch_list, entry, last)
        prefetch_stride = min(LINE, SPARE * num_bytes // (4 * k * max(1, high - low)) + 1)
        done = 0
        full = min(high, n // PANEL)  # the last panel may be wider than what is left of out
        rest = np.empty((BLOCK, PANEL), np.float32)
        for row in range(0, m, BLOCK):
            rows = min(BLOCK, m - row)
            x_at, out_at = at(x) + 4 * row * k, at(out) + 4 * row * n
            step = max(1, full - low) if rows <= 3 else 1  # many rows: a panel stays in the first cache for all of them
            for p in range(low, full, step):
                later_address, later_stride = 0, 0
                if entry < last and m > ROWS:
                    later_address, later_stride, done = (
                        prefetch_list[entry, 0] + done,
                        prefetch_stride,
                        done + k * prefetch_stride,
                    )
                    if done >= prefetch_list[entry, 1]:
                        entry, done = entry + 1, 0
                strides = Strides(k, k, 0, n, PANEL, size, prefetch_offset, later_address, later_stride)
                w_at = at(weight) + p * size * weight.itemsize
                move = 4 * p * PANEL
                multiply(rows, step, x_at, w_at, at(start) + move, out_at + move, strides, item_type)
            if full < high:
                w_at = at(weight) + full * size * weight.itemsize
                begin = at(start) + 4 * full * PANEL
                strides = Strides(k, k, 0, PANEL, PANEL, size, prefetch_offset, 0, 0)
                multiply(rows, high - full, x_at, w_at, begin, at(rest), strides, item_type)
                for r in range(rows):
                    copy(rest[r], out[row + r, full * PANEL :])
            if scales.shape[0]:
                _scale(out, row, rows, low * PANEL, min(n, high * PANEL), scales, bias)
