"""Compute paged causal attention, rotate queries and keys and write keys and values in the same call.

A token's result depends on its own position and length alone: blocks are folded in order, each by `vector`'s loops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from server.model.backends.cpu.loops import Strides, multiply
from server.model.backends.cpu.threads import FASTMATH
from server.model.backends.cpu.vector import FLOATS, PANEL, at, largest, narrowed, view

MAX_TOKENS = 16  # of a tile: blocks are reused from cache, and two threads still balance over three kv heads
SPAN = 256  # positions whose scores are softened at once
NEGATIVE_INFINITY = np.float32(-np.inf)
LOG2_E = np.float32(1.4426950408889634)
LOWEST_EXPONENT = np.float32(-126.0)


class KernelParams(NamedTuple):
    """Parameters of one layer, see `AttentionParams`; window and softcap 0 are none."""

    scaling: np.float32
    window: int
    softcap: np.float32


class AttentionTiles(NamedTuple):
    """A step's rows over the cache: thread t takes tiles[bounds[t] : bounds[t + 1]]."""

    token_blocks: NDArray[np.int64]  # [T] the block that each token's K and V go to
    token_offsets: NDArray[np.int64]  # [T] and the place in it
    block_table: NDArray[np.int64]  # [S, blocks of the longest]
    tiles: NDArray[np.int64]  # [n, 5] = sequence, kv head, first token, number of tokens, first position
    bounds: NDArray[np.int64]  # [threads + 1]


@intrinsic
def _float_of_bits(_typing_context: Any, _bits: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@njit(inline="always", fastmath=FASTMATH)
def exp_of_negative(x):
    """Return e^x for x <= 0 to 2e-7 relative, in a form that vectorises: 2^n 2^f, f in [-0.5, 0.5], Taylor to 6."""
    t = max(x * LOG2_E, LOWEST_EXPONENT)
    n = np.floor(t + np.float32(0.5))
    f = t - n
    p = np.float32(1.5403530e-4)
    p = p * f + np.float32(1.3333558e-3)
    p = p * f + np.float32(9.6181291e-3)
    p = p * f + np.float32(5.5504109e-2)
    p = p * f + np.float32(2.4022651e-1)
    p = p * f + np.float32(6.9314718e-1)
    p = p * f + np.float32(1.0)
    return p * _float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@njit(fastmath=FASTMATH, cache=True)
def _soften(scores, count, top_sum, out, depth):
    """Do one step of online softmax over `count` scores: they become exponentials, and out [depth] is rescaled.

    All are addresses; top_sum = (largest score, sum of exponentials) so far.
    """
    row, state, sums = view(scores, (count,), FLOATS), view(top_sum, (2,), FLOATS), view(out, (depth,), FLOATS)
    top = max(state[0], largest(scores, count))
    shrink = exp_of_negative(state[0] - top) if state[1] > 0 else np.float32(0.0)
    total = np.float32(0.0)
    for p in range(count):
        row[p] = exp_of_negative(row[p] - top)
        total += row[p]
    for i in range(depth):
        sums[i] *= shrink
    state[0], state[1] = top, state[1] * shrink + total


@njit(inline="always")
def _seen(position, base, size, window):
    """Return the part [first, last) of the `size` positions from `base` on that a query at `position` sees."""
    first = max(0, position - window + 1 - base) if window > 0 else 0
    return first, min(size, position + 1 - base)


@njit(cache=True)
def _cap(scores, softcap):
    """Cap scores softly, in place; those of stale positions nobody reads."""
    for r in range(scores.shape[0]):
        for p in range(scores.shape[1]):
            scores[r, p] = softcap * np.tanh(scores[r, p] / softcap)


@njit(inline="always")
def _begin(sums, top_sum):
    """Set what `_soften` goes on from: sums [rows, depth], top_sum [rows, 2]."""
    for r in range(sums.shape[0]):
        for i in range(sums.shape[1]):
            sums[r, i] = np.float32(0.0)
        top_sum[r, 0], top_sum[r, 1] = NEGATIVE_INFINITY, np.float32(0.0)


@njit(cache=True)
def _attend_tile(
    queries, group, keys, values, head, blocks, block_size, position, params, zeros, sums, scores, top_sum, after,
    item_type,
):  # fmt: skip
    """Write sums [rows, depth] of queries [rows, d], `group` rows a position from `position` on, over all blocks.

    The scores of as many blocks as there is room for are softened at once; which blocks those are depends on their
    places in the sequence alone. While a block is read the next one is asked for, and at last what lies at the address
    `after`: blocks lie apart, and no machine foresees where. Stale positions of a recycled block are never multiplied,
    not even by zero: they may hold another's NaN.
    """
    window, softcap, rows = params.window, params.softcap, queries.shape[0]
    (_, num_heads, dim, width), depth, stride = keys.shape, values.shape[3], scores.shape[1]
    k_size, v_size = dim * width * keys.itemsize, block_size * depth * values.itemsize
    k_begin, v_begin = at(keys) + head * k_size, at(values) + head * v_size
    queries_at, zeros_at, sums_at, scores_at, top_sum_at = at(queries), at(zeros), at(sums), at(scores), at(top_sum)
    count, per_span = rows // group, stride // width
    _begin(sums, top_sum)
    lowest = max(0, position - window + 1) if window > 0 else 0
    end = (position + count - 1) // block_size + 1
    for begin in range(lowest // block_size // per_span * per_span, end, per_span):
        low, high = max(begin, lowest // block_size), min(begin + per_span, end)
        v_here = v_begin + blocks[low] * num_heads * v_size
        for b in range(low, high):
            here = k_begin + blocks[b] * num_heads * k_size
            prefetch_offset = (k_begin + blocks[b + 1] * num_heads * k_size if b + 1 < high else v_here) - here
            strides = Strides(dim, dim, 0, stride, width, PANEL, prefetch_offset, 0, 0)
            out = scores_at + 4 * (b - begin) * width
            multiply(rows, width // PANEL, queries_at, here, zeros_at, out, strides, item_type)
        if softcap > 0:
            _cap(scores[:rows], softcap)
        for r in range(rows):
            first, last = _seen(position + r // group, begin * block_size, per_span * block_size, window)
            if first < last:
                row = scores_at + 4 * (r * stride + first)
                _soften(row, last - first, top_sum_at + 8 * r, sums_at + 4 * r * depth, depth)
        for b in range(low, high):
            here, base = v_here, b * block_size
            if b + 1 < high:
                v_here = v_begin + blocks[b + 1] * num_heads * v_size
            else:
                v_here = k_begin + blocks[b + 1] * num_heads * k_size if b + 1 < end else after
            is_whole = _seen(position, base, block_size, 0)[1] == block_size  # by all queries
            is_whole = is_whole and _seen(position + count - 1, base, block_size, window)[0] == 0
            for n in range(1 if is_whole else count):
                first, last = (0, block_size) if is_whole else _seen(position + n, base, block_size, window)
                if first < last:
                    weights = scores_at + 4 * (n * group * stride + (b - begin) * width + first)
                    out, begun = sums_at + 4 * n * group * depth, here + first * depth * values.itemsize
                    strides = Strides(last - first, stride, depth, depth, depth, PANEL, v_here - here, 0, 0)
                    multiply(rows if is_whole else group, depth // PANEL, weights, begun, out, out, strides, item_type)


@njit(fastmath=FASTMATH, cache=True)
def _rotate(vector, cos, sin, factor, out):
    """Write out = factor * rotated vector, all [d]: the first cos.shape[0] dimensions, halves against each other."""
    half = cos.shape[0] // 2
    for i in range(half):
        out[i] = factor * (vector[i] * cos[i] - vector[half + i] * sin[i])
        out[half + i] = factor * (vector[half + i] * cos[half + i] + vector[i] * sin[half + i])
    for i in range(2 * half, vector.shape[0]):
        out[i] = factor * vector[i]


@njit(cache=True)
def _store(qkv, first_key, cos, sin, keys, values, block, offset, num_values):
    """Write the keys, rotated, and the values of one token, qkv [heads * d + kv heads * (d + d_v)]."""
    num_kv_heads, dim = keys.shape[1], keys.shape[2]
    first_value, rotated = first_key + num_kv_heads * dim, np.empty(dim, np.float32)
    for h in range(num_kv_heads):
        _rotate(qkv[first_key + h * dim : first_key + (h + 1) * dim], cos, sin, np.float32(1.0), rotated)
        for i in range(dim):
            keys[block, h, i, offset] = narrowed(rotated[i], keys)
        for i in range(num_values):
            values[block, h, offset, i] = narrowed(qkv[first_value + h * num_values + i], values)


@njit(parallel=True, cache=True)
def _store_rows(qkv, first_key, cos, sin, keys, values, blocks, offsets, num_values):
    for t in prange(qkv.shape[0]):
        _store(qkv[t], first_key, cos[t], sin[t], keys, values, blocks[t], offsets[t], num_values)


@njit(cache=True)
def _gather(qkv, first, cos, sin, scaling, group, queries):
    """Gather queries [count * group, d]: those of one kv head's group of count tokens, rotated and scaled."""
    dim = queries.shape[1]
    for n in range(qkv.shape[0]):
        for g in range(group):
            query = qkv[n, first + g * dim : first + (g + 1) * dim]
            _rotate(query, cos[n], sin[n], scaling, queries[n * group + g])


@njit(parallel=True, cache=True)
def attend(qkv, cos, sin, keys, values, block_size, step, params, out, item_type):
    """Store keys and values of a step's tokens, and attend: out [T, heads, d_v].

    qkv [T, heads * d + kv heads * (d + d_v)]: queries, keys, values. cos, sin [T, rotated] rotate queries and keys;
    [T, 0] rotate none. keys and values are as `KVCache` has them, in 32 or 16 bits by `item_type`. `step` is
    `AttentionTiles`, balanced by the caller, `params` is `KernelParams`.
    """
    token_blocks, token_offsets, block_table = step.token_blocks, step.token_offsets, step.block_table
    tiles, bounds = step.tiles, step.bounds
    num_kv_heads, dim, num_values = keys.shape[1], keys.shape[2], out.shape[2]
    group, scaling = out.shape[1] // num_kv_heads, params.scaling
    first_key = group * num_kv_heads * dim
    if qkv.shape[0] == 1:  # to call the other threads takes longer
        _store(qkv[0], first_key, cos[0], sin[0], keys, values, token_blocks[0], token_offsets[0], num_values)
    else:
        _store_rows(qkv, first_key, cos, sin, keys, values, token_blocks, token_offsets, num_values)
    max_rows, width = MAX_TOKENS * group, keys.shape[3]
    room = max(width, SPAN // width * width) if width == block_size else width
    for thread in prange(bounds.shape[0] - 1):
        queries, sums = np.empty((max_rows, dim), np.float32), np.empty((max_rows, values.shape[3]), np.float32)
        scores, top_sum, zeros = (
            np.empty((max_rows, room), np.float32),
            np.empty((max_rows, 2), np.float32),
            np.zeros(width, np.float32),
        )
        for index in range(bounds[thread], bounds[thread + 1]):
            sequence, head, token, count, position = tiles[index]
            following = tiles[min(index + 1, bounds[thread + 1] - 1)]
            after = at(keys[block_table[following[0], 0], following[1]])
            rows, span = count * group, slice(token, token + count)
            _gather(qkv[span], head * group * dim, cos[span], sin[span], scaling, group, queries)
            _attend_tile(
                queries[:rows], group, keys, values, head, block_table[sequence], block_size, position,
                params, zeros, sums[:rows], scores, top_sum[:rows], after, item_type,
            )  # fmt: skip
            for r in range(rows):
                inverse = np.float32(1.0) / top_sum[r, 1]
                for i in range(num_values):
                    out[token + r // group, head * group + r % group, i] = sums[r, i] * inverse
