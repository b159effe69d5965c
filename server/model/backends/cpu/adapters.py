"""Apply the adapters of many slots to a step's rows, which no library does.

A step's rows come in tiles: neighbours that use the same adapters, so that what is read of one serves all of them. A
row's result depends on its own adapters alone (see `vector`). The slow twins in plain torch are the formulas of
`adapters_store.primitives`, as `backends.reference` applies them. Matrices are kept in items of an `ItemType`;
everything else of an adapter is fp32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from server.model.backends.codes import (
    ACTIVATION_MASK,
    BIAS,
    COUNT,
    DELTA,
    FIRST,
    FIRST_ADAPTER,
    FLAGS,
    GELU,
    GELU_TANH,
    LAST_ADAPTER,
    NORM_AFTER,
    NORM_BEFORE,
    OF_OUTPUT,
    OF_STREAM,
    OFFSET,
    PROJECTION,
    RELU,
    SCALE_IN,
    SCALE_OUT,
    SILU,
    SIZE,
    TANH,
)
from server.model.backends.cpu.loops import ItemType, Strides, dots, multiply
from server.model.backends.cpu.threads import FASTMATH
from server.model.backends.cpu.vector import FLOATS, PANEL, at, copy, view, widened

SQRT_HALF, SQRT_2_PI, GELU_CUBE = np.float32(0.5**0.5), np.float32((2 / np.pi) ** 0.5), np.float32(0.044715)
NORM_EPS, ONE = np.float32(1e-5), np.float32(1.0)
OUTPUTS = 32  # of a delta that a thread computes for all rows in turn: 36 KB of SmolLM2's dW, which stay in cache


class AdapterArgs(NamedTuple):
    """Adapters that a step's rows use, and their addresses; tiles, slots and weights as `RowAdapters` has them.

    addresses [slots] are those of the slots' buffers; table [kinds, sites, slots, 3] has the offset in bytes, the size
    and the flags of each primitive; acts [groups, kinds] says what there is to do in this step. sample, multiply and
    dots are the `ItemType` of matrices: Numba's parallel loops take no tuple within a tuple.
    """

    tiles: NDArray[np.int64]
    slots: NDArray[np.int64]
    weights: NDArray[np.float32]
    addresses: NDArray[np.int64]
    table: NDArray[np.int64]
    acts: NDArray[np.bool_]
    max_rank: int
    sample: NDArray[np.generic]
    multiply: int
    dots: int


@njit(inline="always")
def _view(address, size):
    """Return `size` floats at an address."""
    return view(address, (size,), FLOATS)


@njit(inline="always")
def _aligned(num_bytes):
    """Round up to whole floats, as `layout` lays parts out."""
    return (num_bytes + 3) // 4 * 4


@njit(cache=True)
def _up(rows, t, t_stride, b, rank, n, y, y_stride, item_type):
    """Add t [rows, rank] B to y [rows, n] for B [rank, n]; addresses and strides in items."""
    strides = Strides(rank, t_stride, y_stride, y_stride, n, PANEL, 0, 0, 0)
    multiply(rows, n // PANEL, t, b, y, y, strides, item_type)
    for r in range(rows if n % PANEL else 0):
        out = view(y + 4 * r * y_stride, (n,), FLOATS)
        left = view(t + 4 * r * t_stride, (rank,), FLOATS)
        for j in range(rank):
            for o in range(n // PANEL * PANEL, n):
                out[o] += left[j] * widened(b + (j * n + o) * item_type.sample.itemsize, item_type.sample)


@njit(fastmath=FASTMATH, cache=True)
def _activate(t, activation):
    """Compute t = act(t) in place; `activation` is one of `codes.ACTIVATION_CODES`."""
    for j in range(t.shape[0]):
        v = t[j]
        if activation == RELU:
            t[j] = max(v, np.float32(0.0))
        elif activation == GELU:
            t[j] = np.float32(0.5) * v * (np.float32(1.0) + math.erf(v * SQRT_HALF))
        elif activation == GELU_TANH:
            t[j] = np.float32(0.5) * v * (np.float32(1.0) + np.tanh(SQRT_2_PI * (v + GELU_CUBE * v * v * v)))
        elif activation == SILU:
            t[j] = v / (np.float32(1.0) + np.exp(-v))
        elif activation == TANH:
            t[j] = np.tanh(v)


@njit(cache=True)
def _layer_norms(h, h_stride, norm, out, out_stride, rows, size):
    """Write rows of out from rows of h, by (gamma, beta) at the address `norm`."""
    for r in range(rows):
        row, normed = _view(h + 4 * r * h_stride, size), _view(out + 4 * r * out_stride, size)
        _layer_norm(row, _view(norm, size), _view(norm + 4 * size, size), normed)


@njit(fastmath=FASTMATH, cache=True)
def _layer_norm(h, gamma, beta, out):
    """Write out = gamma (h - mean) / sqrt(variance + eps) + beta; all [size]."""
    mean = np.float32(0.0)
    for i in range(h.shape[0]):
        mean += h[i]
    mean /= np.float32(h.shape[0])
    variance = np.float32(0.0)
    for i in range(h.shape[0]):
        variance += (h[i] - mean) * (h[i] - mean)
    inverse = np.float32(1.0) / np.sqrt(variance / np.float32(h.shape[0]) + NORM_EPS)
    for i in range(h.shape[0]):
        out[i] = gamma[i] * (h[i] - mean) * inverse + beta[i]


@njit(cache=True)
def _low_rank(rows, h, h_stride, size_in, y, size_out, y_stride, address, rank, weight, t, item_type):
    """Add weight B (A h) to rows of y, for rows of h; t [rows, rank] is room."""
    b = address + rank * size_in * item_type.sample.itemsize
    dots(rows, h, h_stride, address, size_in, rank, at(t), t.shape[1], item_type)
    for r in range(rows):
        for j in range(rank):
            t[r, j] *= weight
    _up(rows, at(t), t.shape[1], b, rank, size_out, y, y_stride, item_type)


@njit(cache=True)
def _bottleneck(rows, h, h_stride, size_in, y, size_out, y_stride, address, rank, flags, weight, t, item_type):
    """Add weight N(U act(D M(h) + d) + u) to rows of y, for rows of h; t [rows, rank] is room."""
    d = address + _aligned(rank * (size_in + size_out) * item_type.sample.itemsize)
    u = d + 4 * rank
    norms = u + 4 * size_out
    if flags & NORM_BEFORE:
        normed = np.empty((rows, size_in), np.float32)
        _layer_norms(h, h_stride, norms, at(normed), size_in, rows, size_in)
        norms += 8 * size_in
        h, h_stride = at(normed), size_in
    dots(rows, h, h_stride, address, size_in, rank, at(t), t.shape[1], item_type)
    down_bias, up_bias, change = _view(d, rank), _view(u, size_out), np.empty((rows, size_out), np.float32)
    for r in range(rows):
        for j in range(rank):
            t[r, j] += down_bias[j]
        _activate(t[r, :rank], flags & ACTIVATION_MASK)
        copy(up_bias, change[r])
    up, out = address + rank * size_in * item_type.sample.itemsize, at(change)
    _up(rows, at(t), t.shape[1], up, rank, size_out, out, size_out, item_type)
    if flags & NORM_AFTER:
        _layer_norms(out, size_out, norms, out, size_out, rows, size_out)
    for r in range(rows):
        row = _view(y + 4 * r * y_stride, size_out)
        for o in range(size_out):
            row[o] += weight * change[r, o]


@njit(cache=True)
def _add(rows, bias, weight, y, y_stride):
    """Add weight bias to rows of y."""
    for r in range(rows):
        out = _view(y + 4 * r * y_stride, bias.shape[0])
        for o in range(bias.shape[0]):
            out[o] += weight * bias[o]


@njit(fastmath=FASTMATH, cache=True)
def _scale(rows, v, weight, y, y_stride):
    """Multiply rows of y by 1 + weight (v - 1)."""
    for r in range(rows):
        out = _view(y + 4 * r * y_stride, v.shape[0])
        for i in range(v.shape[0]):
            out[i] *= v[i] + (ONE - weight) * (ONE - v[i])


@njit(cache=True)
def _scales(tile, kind, site, size, y, y_stride, args):
    """Scale the inputs or outputs of a site, for a tile's rows of y."""
    slots, weights, addresses, table = args.slots, args.weights, args.addresses, args.table
    for adapter in range(tile[FIRST_ADAPTER], tile[LAST_ADAPTER]):
        scale, address = table[kind, site, slots[adapter]], addresses[slots[adapter]]
        if scale[SIZE] > 0:
            _scale(tile[COUNT], _view(address + scale[OFFSET], size), weights[adapter], y, y_stride)


@njit(parallel=True, cache=True)
def _act(x, stream, y, columns, sites, is_scaling, is_adding, args):
    """Scale y, then add what projections and biases give, those that read y itself last, one after another."""
    tiles, slot_numbers, adapter_weights = args.tiles, args.slots, args.weights
    addresses, table, max_rank = args.addresses, args.table, args.max_rank
    item_type = ItemType(args.sample, args.multiply, args.dots)
    parts, width = sites.shape[0], y.shape[1]
    for index in prange(tiles.shape[0] * parts):
        tile, part = tiles[index // parts], index % parts
        site, first, rows, size_out = sites[part], tile[FIRST], tile[COUNT], columns[part + 1] - columns[part]
        y_at = at(y) + 4 * (first * width + columns[part])
        t = np.empty((rows, max_rank), np.float32)
        if is_scaling:
            _scales(tile, np.int64(SCALE_OUT), site, size_out, y_at, width, args)
        for is_late in range(2 if is_adding else 0):
            for adapter in range(tile[FIRST_ADAPTER], tile[LAST_ADAPTER]):
                slot, weight = slot_numbers[adapter], adapter_weights[adapter]
                if not is_late and table[BIAS, site, slot, SIZE] > 0:
                    bias = _view(addresses[slot] + table[BIAS, site, slot, OFFSET], size_out)
                    _add(rows, bias, weight, y_at, width)
                rank, flags = table[PROJECTION, site, slot, SIZE], table[PROJECTION, site, slot, FLAGS]
                if rank == 0 or (flags & OF_OUTPUT > 0) != (is_late > 0):
                    continue
                h, h_stride, size_in = at(x) + 4 * first * x.shape[1], x.shape[1], x.shape[1]
                if flags & OF_OUTPUT:
                    h, h_stride, size_in = y_at, width, size_out
                elif flags & OF_STREAM:
                    h, h_stride, size_in = at(stream) + 4 * first * stream.shape[1], stream.shape[1], stream.shape[1]
                address = addresses[slot] + table[PROJECTION, site, slot, OFFSET]
                if flags:
                    _bottleneck(
                        rows, h, h_stride, size_in, y_at, size_out, width, address, rank, flags, weight, t, item_type
                    )
                else:
                    _low_rank(rows, h, h_stride, size_in, y_at, size_out, width, address, rank, weight, t, item_type)


@njit(cache=True)
def list_prefetch(size_in, group, args):
    """List what projections of a group read: [e, 2] = (address, bytes), in the order in which `_act` deals them."""
    sites, columns, tiles, slots = group.sites, group.columns, args.tiles, args.slots
    addresses, table = args.addresses, args.table
    parts = sites.shape[0]
    num_adapters, count = 0, 0
    for tile in range(tiles.shape[0]):
        num_adapters += tiles[tile, LAST_ADAPTER] - tiles[tile, FIRST_ADAPTER]
    out = np.empty((parts * num_adapters, 2), np.int64)
    for index in range(tiles.shape[0] * parts):
        tile, part = tiles[index // parts], index % parts
        for adapter in range(tile[FIRST_ADAPTER], tile[LAST_ADAPTER]):
            projection, size_out = table[PROJECTION, sites[part], slots[adapter]], columns[part + 1] - columns[part]
            out[count, 0] = addresses[slots[adapter]] + projection[OFFSET]
            out[count, 1] = projection[SIZE] * (size_in + size_out) * args.sample.itemsize
            count += 1
    return out


@njit(parallel=True, cache=True)
def enter(x, site, args):
    """Scale the input x [T, in] of a site in place, x *= 1 + weight (v - 1) for each of a row's adapters."""
    tiles, size = args.tiles, x.shape[1]
    for index in prange(tiles.shape[0]):
        _scales(tiles[index], np.int64(SCALE_IN), site, size, at(x) + 4 * tiles[index, FIRST] * size, size, args)


@njit(parallel=True, cache=True)
def deltas(x, y, first_column, last_column, table, args):
    """Add weight dW x to some columns of y [T, out] for each of a row's adapters, dW [out, in]; table [slots, 3].

    A thread takes a few outputs of all rows, so that what it reads of dW is used by all rows that use it.
    """
    tiles, slot_numbers, adapter_weights = args.tiles, args.slots, args.weights
    addresses, item_type = args.addresses, ItemType(args.sample, args.multiply, args.dots)
    size_in, size_out, max_rows = x.shape[1], last_column - first_column, 0
    for index in range(tiles.shape[0]):
        max_rows = max(max_rows, tiles[index, COUNT])
    for part in prange((size_out + OUTPUTS - 1) // OUTPUTS):
        first, last = part * OUTPUTS, min(size_out, (part + 1) * OUTPUTS)
        t = np.empty((max_rows, OUTPUTS), np.float32)
        for index in range(tiles.shape[0]):
            tile = tiles[index]
            for adapter in range(tile[FIRST_ADAPTER], tile[LAST_ADAPTER]):
                slot = slot_numbers[adapter]
                if table[slot, SIZE] > 0:
                    rows, x_at = tile[COUNT], at(x) + 4 * tile[FIRST] * size_in
                    matrix = addresses[slot] + table[slot, OFFSET] + first * size_in * item_type.sample.itemsize
                    dots(rows, x_at, size_in, matrix, size_in, last - first, at(t), t.shape[1], item_type)
                    for r in range(rows):
                        for o in range(first, last):
                            y[tile[FIRST] + r, first_column + o] += adapter_weights[adapter] * t[r, o - first]


@njit(parallel=True, cache=True)
def head_rows(x, y, ids, matrix, weight, item_type):
    """Add weight x dE^T to y[:, ids] for x [T, in], y [T, out], and dE [n, in] at the address `matrix`."""
    (rows, size_in), count = x.shape, ids.shape[0]
    for part in prange((count + OUTPUTS - 1) // OUTPUTS):
        first, last = part * OUTPUTS, min(count, (part + 1) * OUTPUTS)
        t = np.empty((rows, OUTPUTS), np.float32)
        a = matrix + first * size_in * item_type.sample.itemsize
        dots(rows, at(x), size_in, a, size_in, last - first, at(t), t.shape[1], item_type)
        for r in range(rows):
            for o in range(first, last):
                y[r, ids[o]] += weight * t[r, o - first]


@njit(cache=True)
def embed_rows(token_ids, y, ids, matrix, weight, item_type):
    """Add weight dE[j] to rows of y [T, size] whose token is ids[j], ascending; dE [n, size] is at address `matrix`."""
    size = y.shape[1]
    for t in range(token_ids.shape[0]):
        place = np.searchsorted(ids, token_ids[t])
        if place < ids.shape[0] and ids[place] == token_ids[t]:
            for i in range(size):
                y[t, i] += weight * widened(matrix + (place * size + i) * item_type.sample.itemsize, item_type.sample)


@njit(cache=True)
def apply(x, stream, y, group, args):
    """Change y [T, out] in place by the adapters at sites that share the input x [T, in]; some read stream [T, size].

    group is a `SiteGroup`, args are `AdapterArgs`.
    """
    sites, columns, acts, table = group.sites, group.columns, args.acts[group.number], args.table
    is_scaling, is_adding = acts[SCALE_OUT], acts[PROJECTION] or acts[BIAS]
    if acts[DELTA]:
        if is_scaling:
            _act(x, stream, y, columns, sites, is_scaling, not is_scaling, args)
            is_scaling = False
        for part in range(sites.shape[0]):
            deltas(x, y, columns[part], columns[part + 1], table[DELTA, sites[part]], args)
    if is_scaling or is_adding:
        _act(x, stream, y, columns, sites, is_scaling, is_adding, args)
