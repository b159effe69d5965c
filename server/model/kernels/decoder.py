"""A whole Llama-like decoder layer in one call: the same kernels as its parts, without Python between them."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from server.model.kernels.attention import attend
from server.model.kernels.hats import branches
from server.model.kernels.layers import gate, rms_norm
from server.model.kernels.product import product


@njit(parallel=True, cache=True)
def _add(x, y, out):
    """out = x + y, row by row."""
    for row in prange(x.shape[0]):
        for i in range(x.shape[1]):
            out[row, i] = x[row, i] + y[row, i]


@njit(cache=True)
def _linear(x, linear, sites, columns, worn, threads):
    """What `HatLinear` computes where hats add nothing but branches and biases."""
    weight, start, scales, bias = linear
    tiles, slots, weights, addresses, table, biases, max_rank, unit = worn
    out = np.empty((x.shape[0], columns[-1]), np.float32)
    product(x, weight, start, scales, bias, out, threads)
    if tiles.shape[0] > 0:
        branches(x, x, out, columns, sites, tiles, slots, weights, addresses, table, biases, max_rank, unit)
    return out


@njit(cache=True)
def decoder_layer(hidden, norms, eps, linears, sites, columns, activation, turns, cache, paged, manner, worn, threads):
    """hidden [T, size] -> [T, size]: h + attention(norm(h)), then h + mlp(norm(h)).

    linears, sites and columns are of (q k v, o, gate up, down), as `PackedProduct` and `Group` have them. turns = (cos,
    sin); cache = (keys, values, block_size, heads, d_v) of this layer; paged and manner as `attend` takes them, worn as
    `branches` does.
    """
    cos, sin = turns
    keys, values, block_size, num_heads, num_values = cache
    normed = np.empty_like(hidden)
    rms_norm(hidden, norms[0], eps[0], normed)
    qkv = _linear(normed, linears[0], sites[0], columns[0], worn, threads)
    attended = np.empty((hidden.shape[0], num_heads, num_values), np.float32)
    attend(qkv, cos, sin, keys, values, block_size, *paged, manner, attended)
    flat = attended.reshape(hidden.shape[0], num_heads * num_values)
    middle = np.empty_like(hidden)
    _add(hidden, _linear(flat, linears[1], sites[1], columns[1], worn, threads), middle)
    rms_norm(middle, norms[1], eps[1], normed)
    gate_up = _linear(normed, linears[2], sites[2], columns[2], worn, threads)
    gated = np.empty((hidden.shape[0], gate_up.shape[1] // 2), np.float32)
    gate(gate_up, activation, gated)
    out = np.empty_like(hidden)
    _add(middle, _linear(gated, linears[3], sites[3], columns[3], worn, threads), out)
    return out
