"""y = W x + b with the weight packed once: for any number of rows, in 32, 16 or 8 bits, arithmetic in fp32.

Columns of W lie in panels of 16; a thread takes its share of the panels, and walks each with six rows of x at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from server.model.backends.cpu.vector import (
    PANEL,
    tile_1x1,
    tile_1x4,
    tile_2x1,
    tile_2x2,
    tile_3x1,
    tile_3x2,
    tile_4x1,
    tile_5x1,
    tile_6x1,
)

ROWS = 6
PREFETCH_OFFSET = 4096  # bytes: a product that streams its weight from memory is then as fast as from cache
LINE = 64  # bytes that memory gives at once
SPARE = 5  # quarters of what prefetching needs: it ends between panels
NO_PREFETCH = np.empty((0, 2), np.int64)
BLOCK = 96  # rows whose x stays in the second cache while all panels go by


class Strides(NamedTuple):
    """Strides of a product's operands in items, and of what is asked for from memory meanwhile in bytes.

    x, start and out by row, w by row within a panel and by panel. `prefetch_offset` says how far from a panel that lies
    which is read next; `later_address` what is wanted later, `later_stride` how many bytes of it a step asks for.
    """

    k: int
    x_row: int
    start_row: int
    out_row: int
    w_row: int
    w_panel: int
    prefetch_offset: int
    later_address: int
    later_stride: int


class TileStrides(NamedTuple):
    """The strides of one part of a product, as `vector`'s tiles take them: what they ask for is one stream."""

    k: int
    x_row: int
    start_row: int
    out_row: int
    w_row: int
    w_panel: int
    prefetch_offset: int
    prefetch_stride: int


@njit(inline="always")
def at(array):
    """Return an array's address."""
    return np.int64(array.ctypes.data)


@njit(cache=True)
def _one_panel(rows, x, w, start, out, strides, item_type):
    """Run `tile` of one panel for 1 to 6 rows."""
    if rows == 6:
        tile_6x1(x, w, start, out, strides, item_type)
    elif rows == 5:
        tile_5x1(x, w, start, out, strides, item_type)
    elif rows == 4:
        tile_4x1(x, w, start, out, strides, item_type)
    elif rows == 3:
        tile_3x1(x, w, start, out, strides, item_type)
    elif rows == 2:
        tile_2x1(x, w, start, out, strides, item_type)
    else:
        tile_1x1(x, w, start, out, strides, item_type)


@njit(cache=True)
def _few_rows(rows, x, w, start, out, strides, item_type):
    """Run `tile` of 4 panels for 1 row, of 2 for 2 or 3 rows."""
    if rows == 1:
        tile_1x4(x, w, start, out, strides, item_type)
    elif rows == 2:
        tile_2x2(x, w, start, out, strides, item_type)
    else:
        tile_3x2(x, w, start, out, strides, item_type)


@njit(cache=True)
def multiply(rows, panels, x, w, start, out, strides, item_type):
    """Run `tile` for any number of rows and of panels; x, w, start and out are addresses.

    Six rows at a time: each of these parts asks for its share of what is read next, so that the reading is spread
    evenly, and if something is wanted later, the last part asks for that alone.
    """
    k = strides.k
    parts = (rows + ROWS - 1) // ROWS
    sharing = parts - 1 if strides.later_stride > 0 else parts
    prefetch_stride = (strides.w_row * item_type.itemsize + sharing - 1) // max(1, sharing)
    for part in range(parts):
        first, few = rows * part // parts, rows * (part + 1) // parts - rows * part // parts
        x_at, start_at, out_at = (
            x + 4 * first * strides.x_row,
            start + 4 * first * strides.start_row,
            out + 4 * first * strides.out_row,
        )
        later = (
            (strides.prefetch_offset + part * k * prefetch_stride, prefetch_stride)
            if part < sharing
            else (strides.later_address - w, strides.later_stride)
        )
        mine = TileStrides(
            k, strides.x_row, strides.start_row, strides.out_row, strides.w_row, strides.w_panel, later[0], later[1]
        )
        panel, group = 0, 4 if few == 1 else 2
        while panel < panels:
            w_at, move = w + panel * strides.w_panel * item_type.itemsize, 4 * panel * PANEL
            if few > 3 or panel + group > panels:
                _one_panel(few, x_at, w_at, start_at + move, out_at + move, mine, item_type)
                panel += 1
            else:
                _few_rows(few, x_at, w_at, start_at + move, out_at + move, mine, item_type)
                panel += group


@njit(parallel=True, cache=True)
def product(x, weight, start, scales, bias, out, threads, prefetch_list):
    """Write out [m, n] = x [m, k] @ weight + start, weight [panels, k, 16] as `weights` packs it, start [panels * 16].

    For 8 bits the sums are multiplied by scales [n], and then bias [n] is added; elsewhere both are empty. Meanwhile
    memory that is read afterwards is asked for: prefetch_list [e, 2] = (address, bytes), dealt to the threads in order.
    Many rows leave the way to memory idle.
    """
    m, k = x.shape
    n, size = out.shape[1], k * PANEL
    prefetch_offset = PREFETCH_OFFSET if m <= ROWS else size * weight.itemsize
    for thread in prange(threads):
        low, high = weight.shape[0] * thread // threads, weight.shape[0] * (thread + 1) // threads
        entry, last = len(prefetch_list) * thread // threads, len(prefetch_list) * (thread + 1) // threads
        prefetch_stride = min(LINE, SPARE * prefetch_list[entry:last, 1].sum() // (4 * k * max(1, high - low)) + 1)
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
                multiply(rows, step, x_at, w_at, at(start) + move, out_at + move, strides, weight)
            if full < high:
                w_at = at(weight) + full * size * weight.itemsize
                begin = at(start) + 4 * full * PANEL
                strides = Strides(k, k, 0, PANEL, PANEL, size, prefetch_offset, 0, 0)
                multiply(rows, 1, x_at, w_at, begin, at(rest), strides, weight)
                out[row : row + rows, full * PANEL :] = rest[:rows, : n - full * PANEL]
            for r in range(row, row + rows if scales.shape[0] else row):
                for c in range(low * PANEL, min(n, high * PANEL)):
                    out[r, c] = out[r, c] * scales[c] + bias[c]
