"""Paged causal attention, with the rotation of queries and keys and the writing of keys and values in the same call.

A token's result depends on its own position and length alone: blocks are folded in order, each by `vector`'s loops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from server.model.kernels.product import at, multiply
from server.model.kernels.threads import FASTMATH
from server.model.kernels.vector import PANEL, narrowed

MAX_TOKENS = 16  # of a tile: blocks are reused from cache, and two threads still balance over three kv heads
NEGATIVE_INFINITY = np.float32(-np.inf)
LOG2_E = np.float32(1.4426950408889634)
LOWEST_EXPONENT = np.float32(-126.0)


@intrinsic
def _float_of_bits(_typing_context: Any, _bits: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@njit(inline="always", fastmath=FASTMATH)
def exp_of_negative(x):
    """e^x for x <= 0 to 2e-7 relative, in a form that vectorises: 2^n 2^f, f in [-0.5, 0.5], Taylor of degree 6."""
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
def _soften(scores, first, last, top_sum, out):
    """One step of online softmax over scores [first, last): they become exponentials, and out is rescaled.

    top_sum = (largest score, sum of exponentials) so far.
    """
    top = top_sum[0]
    for p in range(first, last):
        top = max(top, scores[p])
    shrink = exp_of_negative(top_sum[0] - top) if top_sum[1] > 0 else np.float32(0.0)
    total = np.float32(0.0)
    for p in range(first, last):
        scores[p] = exp_of_negative(scores[p] - top)
        total += scores[p]
    for i in range(out.shape[0]):
        out[i] *= shrink
    top_sum[0] = top
    top_sum[1] = top_sum[1] * shrink + total


@njit(inline="always")
def _seen(position, base, block_size, window):
    """The part [first, last) of the block that begins at position `base` that a query at `position` sees."""
    first = max(0, position - window + 1 - base) if window > 0 else 0
    return first, min(block_size, position + 1 - base)


@njit(cache=True)
def _score(queries, keys, ahead, softcap, scores):
    """scores [rows, width] = queries [rows, d] keys [d, width], soft-capped; those of stale positions nobody reads."""
    (rows, dim), width = queries.shape, keys.shape[1]
    scores[:] = np.float32(0.0)
    out = at(scores)
    multiply(rows, width // PANEL, at(queries), at(keys), out, out, (dim, dim, width, width, width, PANEL, ahead), keys)
    if softcap > 0:
        for r in range(rows):
            for p in range(width):
                scores[r, p] = softcap * np.tanh(scores[r, p] / softcap)


@njit(cache=True)
def _fold(scores, rows, first, last, values, ahead, sums):
    """sums [rows, depth] += scores [rows, first : last] values [first : last, depth]."""
    width, depth = scores.shape[1], values.shape[1]
    steps, out = (last - first, width, depth, depth, depth, PANEL, ahead), at(sums)
    begin = at(values) + first * depth * values.itemsize
    multiply(rows, depth // PANEL, at(scores) + 4 * first, begin, out, out, steps, values)


@njit(cache=True)
def _attend_tile(
    queries, group, keys, values, blocks, block_size, position, window, softcap, sums, scores, top_sum, after
):
    """Sums [rows, depth] of queries [rows, d], `group` rows a position from `position` on, over a sequence's blocks.

    keys, values are those of one kv head. While a block is read the next one is asked for, and at last what lies at the
    addresses `after`: blocks lie apart, and no machine foresees where. Stale positions of a recycled block are never
    multiplied, not even by zero: they may hold another's NaN.
    """
    count = queries.shape[0] // group
    sums[:] = np.float32(0.0)
    top_sum[:, 0] = NEGATIVE_INFINITY
    top_sum[:, 1] = np.float32(0.0)
    lowest = max(0, position - window + 1) if window > 0 else 0
    last_block = (position + count - 1) // block_size
    for b in range(lowest // block_size, last_block + 1):
        k, v, base = keys[blocks[b]], values[blocks[b]], b * block_size
        is_last = b == last_block
        _score(queries, k, (after[0] if is_last else at(keys[blocks[b + 1]])) - at(k), softcap, scores)
        ahead = (after[1] if is_last else at(values[blocks[b + 1]])) - at(v)
        is_whole = True  # all queries see all of the block
        for n in range(count):
            first, last = _seen(position + n, base, block_size, window)
            is_whole = is_whole and first == 0 and last == block_size
            for r in range(n * group, (n + 1) * group if first < last else n * group):
                _soften(scores[r], first, last, top_sum[r], sums[r])
        if is_whole:
            _fold(scores, count * group, 0, block_size, v, ahead, sums)
            continue
        for n in range(count):
            first, last = _seen(position + n, base, block_size, window)
            if first < last:
                _fold(scores[n * group :], group, first, last, v, ahead, sums[n * group :])


@njit(fastmath=FASTMATH, cache=True)
def _rotate(vector, cos, sin, factor, out):
    """out = factor * rotated vector, all [d]: the first cos.shape[0] dimensions, halves against each other."""
    half = cos.shape[0] // 2
    for i in range(half):
        out[i] = factor * (vector[i] * cos[i] - vector[half + i] * sin[i])
        out[half + i] = factor * (vector[half + i] * cos[half + i] + vector[i] * sin[half + i])
    for i in range(2 * half, vector.shape[0]):
        out[i] = factor * vector[i]


@njit(cache=True)
def _store(qkv, first_key, cos, sin, keys, values, block, offset, num_values, turned):
    """Write the keys, turned, and the values of one token, qkv [heads * d + kv heads * (d + d_v)]."""
    num_kv_heads, dim = keys.shape[1], keys.shape[2]
    first_value = first_key + num_kv_heads * dim
    for h in range(num_kv_heads):
        _rotate(qkv[first_key + h * dim : first_key + (h + 1) * dim], cos, sin, np.float32(1.0), turned)
        for i in range(dim):
            keys[block, h, i, offset] = narrowed(turned[i], keys)
        for i in range(num_values):
            values[block, h, offset, i] = narrowed(qkv[first_value + h * num_values + i], values)


@njit(cache=True)
def _gather(qkv, first, cos, sin, scaling, group, queries):
    """queries [count * group, d]: those of one kv head's group of count tokens, turned and scaled."""
    dim = queries.shape[1]
    for n in range(qkv.shape[0]):
        for g in range(group):
            query = qkv[n, first + g * dim : first + (g + 1) * dim]
            _rotate(query, cos[n], sin[n], scaling, queries[n * group + g])


@njit(parallel=True, cache=True)
def attend(
    qkv, cos, sin, keys, values, block_size, token_blocks, token_offsets, block_table, tiles, bounds, manner, out
):
    """Store keys and values of a step's tokens, and attend: out [T, heads, d_v].

    qkv [T, heads * d + kv heads * (d + d_v)]: queries, keys, values. cos, sin [T, turned] turn queries and keys; [T, 0]
    turn none. keys and values are as `KVCache` has them, in 32 or 16 bits. tiles [n, 5] = (sequence, kv head, first
    token, number of tokens, first position); thread t takes tiles[bounds[t] : bounds[t + 1]], balanced by the caller.
    manner = (scaling, window, softcap); window and softcap 0 are none.
    """
    num_kv_heads, dim, num_values = keys.shape[1], keys.shape[2], out.shape[2]
    group, (scaling, window, softcap) = out.shape[1] // num_kv_heads, manner
    for t in prange(qkv.shape[0]):
        turned = np.empty(dim, np.float32)
        first_key = group * num_kv_heads * dim
        _store(qkv[t], first_key, cos[t], sin[t], keys, values, token_blocks[t], token_offsets[t], num_values, turned)
    for thread in prange(bounds.shape[0] - 1):
        most = MAX_TOKENS * group
        queries, sums = np.empty((most, dim), np.float32), np.empty((most, values.shape[3]), np.float32)
        scores, top_sum = np.empty((most, keys.shape[3]), np.float32), np.empty((most, 2), np.float32)
        for index in range(bounds[thread], bounds[thread + 1]):
            sequence, head, token, count, position = tiles[index]
            following = tiles[min(index + 1, bounds[thread + 1] - 1)]
            block = block_table[following[0], 0]
            after = at(keys[block, following[1]]), at(values[block, following[1]])
            rows, span = count * group, slice(token, token + count)
            _gather(qkv[span], head * group * dim, cos[span], sin[span], scaling, group, queries)
            _attend_tile(
                queries[:rows], group, keys[:, head], values[:, head], block_table[sequence], block_size, position,
                window, softcap, sums[:rows], scores[:rows], top_sum[:rows], after,
            )  # fmt: skip
            for r in range(rows):
                inverse = np.float32(1.0) / top_sum[r, 1]
                for i in range(num_values):
                    out[token + r // group, head * group + r % group, i] = sums[r, i] * inverse
