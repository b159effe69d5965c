"""CPU kernels of paged attention, which no library has; `hat_kernels` has those of the primitives.

They are batch-invariant by construction: a token's result is computed by one thread, in an order that depends on
its own position and length alone, never on its neighbours in the batch. Their slow twin in plain torch is
`attention.attend_reference`. Numba must share torch's OpenMP, so torch is imported first.

`fastmath` allows reassociation (a dot product cannot be vectorised without) but not the assumption that
there are no infinities or NaNs: the masks need the former, the refusal of broken adapters the latter.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

numba.config.THREADING_LAYER = "omp"
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
NEGATIVE_INFINITY = np.float32(-np.inf)
LOG2_E = np.float32(1.4426950408889634)
LOWEST_EXPONENT = np.float32(-126.0)


def set_num_threads(num_threads: int) -> None:
    """Give torch and Numba the same number of threads."""
    torch.set_num_threads(num_threads)
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))


@intrinsic
def _float_of_bits(_typing_context: Any, _bits: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@njit(inline="always", fastmath=FASTMATH)
def _exp(x):
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
def _score_block(query, n, g, keys, scaling, softcap, scores):
    """scores[p] = scaling q.k[p] (soft-capped), eight dimensions at a time, q = query[n, g] [d].

    keys [d, block] have their positions side by side, so that no sum runs along a vector register.
    """
    dim, size = query.shape[2], scores.shape[0]
    for p in range(size):
        scores[p] = np.float32(0.0)
    whole = dim // 8 * 8
    for i in range(0, whole, 8):
        q0, q1, q2, q3 = query[n, g, i], query[n, g, i + 1], query[n, g, i + 2], query[n, g, i + 3]
        q4, q5, q6, q7 = query[n, g, i + 4], query[n, g, i + 5], query[n, g, i + 6], query[n, g, i + 7]
        for p in range(size):
            scores[p] += (
                (q0 * keys[i, p] + q1 * keys[i + 1, p])
                + (q2 * keys[i + 2, p] + q3 * keys[i + 3, p])
                + (q4 * keys[i + 4, p] + q5 * keys[i + 5, p])
                + (q6 * keys[i + 6, p] + q7 * keys[i + 7, p])
            )
    for i in range(whole, dim):
        for p in range(size):
            scores[p] += query[n, g, i] * keys[i, p]
    for p in range(size):
        scores[p] *= scaling
    if softcap > 0:
        for p in range(size):
            scores[p] = softcap * np.tanh(scores[p] / softcap)


@njit(fastmath=FASTMATH, cache=True)
def _fold_block(scores, values, first, last, top_sum, n, g, out):
    """One step of online softmax over positions [first, last): out[n, g] += p v, rescaled.

    top_sum[n, g] = (largest score, sum of exponentials) so far.
    """
    dim, top = out.shape[2], top_sum[n, g, 0]
    for p in range(first, last):
        top = max(top, scores[p])
    shrink = _exp(top_sum[n, g, 0] - top) if top_sum[n, g, 1] > 0 else np.float32(0.0)
    total = np.float32(0.0)
    for p in range(first, last):
        scores[p] = _exp(scores[p] - top)
        total += scores[p]
    for i in range(dim):
        out[n, g, i] *= shrink
    # Stale positions of a recycled block are never multiplied, not even by zero: they may hold another's NaN.
    whole = first + (last - first) // 8 * 8
    for p in range(first, whole, 8):
        p0, p1, p2, p3 = scores[p], scores[p + 1], scores[p + 2], scores[p + 3]
        p4, p5, p6, p7 = scores[p + 4], scores[p + 5], scores[p + 6], scores[p + 7]
        for i in range(dim):
            out[n, g, i] += (
                (p0 * values[p, i] + p1 * values[p + 1, i])
                + (p2 * values[p + 2, i] + p3 * values[p + 3, i])
                + (p4 * values[p + 4, i] + p5 * values[p + 5, i])
                + (p6 * values[p + 6, i] + p7 * values[p + 7, i])
            )
    for p in range(whole, last):
        for i in range(dim):
            out[n, g, i] += scores[p] * values[p, i]
    top_sum[n, g, 0] = top
    top_sum[n, g, 1] = top_sum[n, g, 1] * shrink + total


@njit(fastmath=FASTMATH, cache=True)
def _attend_tile(query, keys, values, blocks, position, kv_head, scaling, window, softcap, out, scratch):
    """Queries [n, G, d] at `position ..` of a sequence over its blocks of one kv head; a K/V block is read once.

    Queries are copied and sums kept side by side: of a slice of heads the compiler knows no stride.
    """
    num_queries, group, dim = query.shape
    block_size = keys.shape[3]
    queries = np.empty((num_queries, group, dim), np.float32)
    queries[:] = query
    sums = np.zeros((num_queries, group, values.shape[3]), np.float32)
    top_sum = np.zeros((num_queries, group, 2), np.float32)
    top_sum[:, :, 0] = NEGATIVE_INFINITY
    lowest = max(0, position - window + 1) if window > 0 else 0
    for b in range(lowest // block_size, (position + num_queries - 1) // block_size + 1):
        k, v = keys[blocks[b], kv_head], values[blocks[b], kv_head]
        for n in range(num_queries):
            first = max(0, position + n - window + 1 - b * block_size) if window > 0 else 0
            last = min(block_size, position + n + 1 - b * block_size)
            if first >= last:
                continue
            for g in range(group):
                _score_block(queries, n, g, k, scaling, softcap, scratch)
                _fold_block(scratch, v, first, last, top_sum, n, g, sums)
    for n in range(num_queries):
        for g in range(group):
            inverse = np.float32(1.0) / top_sum[n, g, 1]
            for i in range(sums.shape[2]):
                out[n, g, i] = sums[n, g, i] * inverse


@njit(parallel=True, cache=True)
def store(keys, values, key, value, token_blocks, token_offsets):
    """Write k, v [T, kv heads, d] to the cache at (token_blocks, token_offsets) [T].

    keys [num_blocks, kv heads, d, block], values [num_blocks, kv heads, block, d].
    """
    for t in prange(key.shape[0]):
        block, offset = token_blocks[t], token_offsets[t]
        for h in range(key.shape[1]):
            for i in range(key.shape[2]):
                keys[block, h, i, offset] = key[t, h, i]
            for i in range(value.shape[2]):
                values[block, h, offset, i] = value[t, h, i]


@njit(parallel=True, cache=True)
def attend(query, keys, values, block_table, tiles, bounds, scaling, window, softcap, out):
    """Causal attention of query [T, H, d] over a paged cache into out [T, H, d_v].

    tiles [n, 4] = (sequence, kv head, first token, number of tokens | position in column 4); thread t takes
    tiles[bounds[t]:bounds[t + 1]], balanced by the caller. window 0 is none; softcap 0 is none.
    """
    group = query.shape[1] // keys.shape[1]
    for thread in prange(bounds.shape[0] - 1):
        scratch = np.empty(keys.shape[3], np.float32)
        for tile in range(bounds[thread], bounds[thread + 1]):
            sequence, head, token, count, position = tiles[tile]
            heads = slice(head * group, (head + 1) * group)
            _attend_tile(
                query[token : token + count, heads],
                keys,
                values,
                block_table[sequence],
                position,
                head,
                scaling,
                window,
                softcap,
                out[token : token + count, heads],
                scratch,
            )
