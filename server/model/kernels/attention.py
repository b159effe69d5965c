"""Paged causal attention, with the rotation of queries and keys and the writing of keys and values in the same call.

A token's result depends on its own position and length alone: blocks are folded in order, each by `vector`'s loops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from server.model.kernels.product import at, multiply_wide
from server.model.kernels.threads import FASTMATH
from server.model.kernels.vector import PANEL

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


@njit(cache=True)
def _attend_tile(
    queries, group, keys, values, blocks, block_size, position, head, window, softcap, sums, scores, top_sum
):
    """Sums [rows, d_v] of queries [rows, d], `group` rows a position from `position` on, over blocks of one kv head.

    Stale positions of a recycled block are never multiplied, not even by zero: they may hold another's NaN.
    """
    rows, dim = queries.shape
    count = rows // group
    width, depth = keys.shape[3], values.shape[3]
    sums[:] = np.float32(0.0)
    top_sum[:, 0] = NEGATIVE_INFINITY
    top_sum[:, 1] = np.float32(0.0)
    zeros = np.zeros(width, np.float32)
    lowest = max(0, position - window + 1) if window > 0 else 0
    for b in range(lowest // block_size, (position + count - 1) // block_size + 1):
        k, v = keys[blocks[b], head], values[blocks[b], head]
        base = b * block_size
        multiply_wide(
            rows, width // PANEL, at(queries), dim, at(k), width, PANEL, dim,
            at(zeros), 0, at(scores), width, queries,
        )  # fmt: skip
        if softcap > 0:
            for r in range(rows):
                for p in range(width):
                    scores[r, p] = softcap * np.tanh(scores[r, p] / softcap)
        is_whole = True
        for n in range(count):
            first = max(0, position + n - window + 1 - base) if window > 0 else 0
            last = min(block_size, position + n + 1 - base)
            if first > 0 or last < block_size:
                is_whole = False
            for r in range(n * group, (n + 1) * group if first < last else n * group):
                _soften(scores[r], first, last, top_sum[r], sums[r])
        if is_whole:
            multiply_wide(
                rows, depth // PANEL, at(scores), width, at(v), depth, PANEL, block_size,
                at(sums), depth, at(sums), depth, queries,
            )  # fmt: skip
            continue
        for n in range(count):
            first = max(0, position + n - window + 1 - base) if window > 0 else 0
            last = min(block_size, position + n + 1 - base)
            if first < last:
                out = at(sums) + 4 * n * group * depth
                multiply_wide(
                    group, depth // PANEL, at(scores) + 4 * (n * group * width + first), width,
                    at(v) + 4 * first * depth, depth, PANEL, last - first, out, depth, out, depth, queries,
                )  # fmt: skip


@njit(fastmath=FASTMATH, cache=True)
def _rotate(vector, cos, sin, factor, out):
    """out = factor * rotated vector, all [d]: the first cos.shape[0] dimensions, halves against each other."""
    half = cos.shape[0] // 2
    for i in range(half):
        out[i] = factor * (vector[i] * cos[i] - vector[half + i] * sin[i])
        out[half + i] = factor * (vector[half + i] * cos[half + i] + vector[i] * sin[half + i])
    for i in range(2 * half, vector.shape[0]):
        out[i] = factor * vector[i]


@njit(parallel=True, cache=True)
def attend(
    qkv, num_heads, dim, cos, sin, keys, values, block_size, token_blocks, token_offsets, block_table, tiles, bounds,
    scaling, window, softcap, out,
):  # fmt: skip
    """Store keys and values of a step's tokens, and attend: out [T, heads, d_v].

    qkv [T, heads * d + kv heads * (d + d_v)]: queries, keys, values. cos, sin [T, rotated d] turn queries and keys;
    [T, 0] turns none. keys [blocks, kv heads, d, width] have positions side by side, values [blocks, kv heads, width,
    depth]: width and depth are the block's size and d_v, rounded up to whole panels. tiles [n, 5] = (sequence, kv head,
    first token, number of tokens, first position); thread t takes tiles[bounds[t] : bounds[t + 1]], balanced by the caller.
    window and softcap 0 are none.
    """
    num_kv_heads = keys.shape[1]
    group, num_values = num_heads // num_kv_heads, out.shape[2]
    first_key, first_value = num_heads * dim, (num_heads + num_kv_heads) * dim
    for t in prange(qkv.shape[0]):
        block, offset = token_blocks[t], token_offsets[t]
        turned = np.empty(dim, np.float32)
        for h in range(num_kv_heads):
            _rotate(qkv[t, first_key + h * dim : first_key + (h + 1) * dim], cos[t], sin[t], np.float32(1.0), turned)
            for i in range(dim):
                keys[block, h, i, offset] = turned[i]
            for i in range(num_values):
                values[block, h, offset, i] = qkv[t, first_value + h * num_values + i]
    for thread in prange(bounds.shape[0] - 1):
        most = 1
        for index in range(bounds[thread], bounds[thread + 1]):
            most = max(most, tiles[index, 3] * group)
        queries, sums = np.empty((most, dim), np.float32), np.empty((most, values.shape[3]), np.float32)
        scores, top_sum = np.empty((most, keys.shape[3]), np.float32), np.empty((most, 2), np.float32)
        for index in range(bounds[thread], bounds[thread + 1]):
            sequence, head, token, count, position = tiles[index]
            rows = count * group
            for n in range(count):
                for g in range(group):
                    q = (head * group + g) * dim
                    _rotate(
                        qkv[token + n, q : q + dim], cos[token + n], sin[token + n], scaling, queries[n * group + g]
                    )
            _attend_tile(
                queries[:rows], group, keys, values, block_table[sequence], block_size, position, head, window, softcap,
                sums[:rows], scores[:rows], top_sum[:rows],
            )  # fmt: skip
            for n in range(count):
                for g in range(group):
                    inverse = np.float32(1.0) / top_sum[n * group + g, 1]
                    for i in range(num_values):
                        out[token + n, head * group + g, i] = sums[n * group + g, i] * inverse
