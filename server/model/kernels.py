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
def _score_block(query, keys, scaling, softcap, scores):
    """scores[p] = scaling q.k[p] (soft-capped), four at a time. query [d], keys [block, d], scores [block]."""
    for p in range(0, keys.shape[0], 4):
        s0 = s1 = s2 = s3 = np.float32(0.0)
        k0, k1, k2, k3 = keys[p], keys[p + 1], keys[p + 2], keys[p + 3]
        for i in range(query.shape[0]):
            s0 += query[i] * k0[i]
            s1 += query[i] * k1[i]
            s2 += query[i] * k2[i]
            s3 += query[i] * k3[i]
        scores[p], scores[p + 1], scores[p + 2], scores[p + 3] = s0 * scaling, s1 * scaling, s2 * scaling, s3 * scaling
    if softcap > 0:
        for p in range(keys.shape[0]):
            scores[p] = softcap * np.tanh(scores[p] / softcap)


@njit(fastmath=FASTMATH, cache=True)
def _fold_block(scores, values, first, last, running, out):
    """One step of online softmax over positions [first, last): running = (max, sum), out [d] += p v, rescaled."""
    top = running[0]
    for p in range(first, last):
        top = max(top, scores[p])
    shrink = _exp(running[0] - top) if running[1] > 0 else np.float32(0.0)
    total = np.float32(0.0)
    for p in range(first, last):
        scores[p] = _exp(scores[p] - top)
        total += scores[p]
    for i in range(out.shape[0]):
        out[i] *= shrink
    # Stale positions of a recycled block are never multiplied, not even by zero: they may hold another's NaN.
    whole = first + (last - first) // 4 * 4
    for p in range(first, whole, 4):
        v0, v1, v2, v3 = values[p], values[p + 1], values[p + 2], values[p + 3]
        p0, p1, p2, p3 = scores[p], scores[p + 1], scores[p + 2], scores[p + 3]
        for i in range(out.shape[0]):
            out[i] += p0 * v0[i] + p1 * v1[i] + p2 * v2[i] + p3 * v3[i]
    for p in range(whole, last):
        for i in range(out.shape[0]):
            out[i] += scores[p] * values[p, i]
    running[0] = top
    running[1] = running[1] * shrink + total


@njit(fastmath=FASTMATH, cache=True)
def _attend_tile(query, keys, values, blocks, position, kv_head, scaling, window, softcap, out, scratch):
    """Queries [n, G, d] at `position ..` of a sequence over its blocks of one kv head; a K/V block is read once."""
    num_queries, group, _dim = query.shape
    block_size = keys.shape[2]
    running = np.zeros((num_queries, group, 2), np.float32)
    running[:, :, 0] = NEGATIVE_INFINITY
    out[:] = np.float32(0.0)
    lowest = max(0, position - window + 1) if window > 0 else 0
    for b in range(lowest // block_size, (position + num_queries - 1) // block_size + 1):
        k, v = keys[blocks[b], kv_head], values[blocks[b], kv_head]
        for n in range(num_queries):
            first = max(0, position + n - window + 1 - b * block_size) if window > 0 else 0
            last = min(block_size, position + n + 1 - b * block_size)
            if first >= last:
                continue
            for g in range(group):
                _score_block(query[n, g], k, scaling, softcap, scratch)
                _fold_block(scratch, v, first, last, running[n, g], out[n, g])
    for n in range(num_queries):
        for g in range(group):
            inverse = np.float32(1.0) / running[n, g, 1]
            for i in range(out.shape[2]):
                out[n, g, i] *= inverse


@njit(parallel=True, cache=True)
def store(keys, values, key, value, token_blocks, token_offsets):
    """Write k, v [T, kv heads, d] to cache [num_blocks, kv heads, block, d] at (token_blocks, token_offsets) [T]."""
    for t in prange(key.shape[0]):
        block, offset = token_blocks[t], token_offsets[t]
        for h in range(key.shape[1]):
            for i in range(key.shape[2]):
                keys[block, h, offset, i] = key[t, h, i]
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
        scratch = np.empty(keys.shape[2], np.float32)
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
