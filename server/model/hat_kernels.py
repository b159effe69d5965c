"""CPU kernels of the primitives: what the patches of many slots do to a step's mixed rows, which no library has.

They are batch-invariant by construction: a row's result is computed in an order that depends on its own patches
alone, never on its neighbours in the batch. Their slow twins in plain torch are the formulas in
`adapters_store.patch`, as `bank.apply_reference` applies them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit, prange, types
from numba.extending import intrinsic

from server.model.kernels import FASTMATH

SQRT_HALF, SQRT_2_PI, GELU_CUBE = np.float32(0.5**0.5), np.float32((2 / np.pi) ** 0.5), np.float32(0.044715)
NORM_EPS = np.float32(1e-5)
TILE = 32  # outputs of a delta that a thread computes for all rows in turn: 72 KB of SmolLM2's dW, which stay in L2
# Flags of a branch: its activation's code, then bits. No flag at all is a LoRA.
ACTIVATION, IS_BIASED, NORM_BEFORE, NORM_AFTER, OF_OUTPUT, OF_STREAM = 15, 16, 32, 64, 128, 256


@intrinsic
def _float_pointer(_typing_context: Any, _address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), codegen


@njit(fastmath=FASTMATH, cache=True)
def _down(x, a, t):
    """t [r] = A x, four ranks at a time. x [in], a [r, in]."""
    whole = a.shape[0] // 4 * 4
    for j in range(0, whole, 4):
        t0 = t1 = t2 = t3 = np.float32(0.0)
        a0, a1, a2, a3 = a[j], a[j + 1], a[j + 2], a[j + 3]
        for i in range(x.shape[0]):
            t0 += a0[i] * x[i]
            t1 += a1[i] * x[i]
            t2 += a2[i] * x[i]
            t3 += a3[i] * x[i]
        t[j], t[j + 1], t[j + 2], t[j + 3] = t0, t1, t2, t3
    for j in range(whole, a.shape[0]):
        t0 = np.float32(0.0)
        for i in range(x.shape[0]):
            t0 += a[j, i] * x[i]
        t[j] = t0


@njit(fastmath=FASTMATH, cache=True)
def _up(t, b, weight, y):
    """y [out] += weight B t, where b [r, out] is B transposed so that the inner loop runs along memory."""
    rank = b.shape[0]
    whole = rank // 4 * 4
    for j in range(0, whole, 4):
        t0, t1, t2, t3 = weight * t[j], weight * t[j + 1], weight * t[j + 2], weight * t[j + 3]
        b0, b1, b2, b3 = b[j], b[j + 1], b[j + 2], b[j + 3]
        for o in range(y.shape[0]):
            y[o] += t0 * b0[o] + t1 * b1[o] + t2 * b2[o] + t3 * b3[o]
    for j in range(whole, rank):
        t0 = weight * t[j]
        for o in range(y.shape[0]):
            y[o] += t0 * b[j, o]


@njit(fastmath=FASTMATH, cache=True)
def _activate(t, activation):
    """t = act(t) in place; `activation` is a place in `bank.ACTIVATION_CODES`."""
    for j in range(t.shape[0]):
        v = t[j]
        if activation == 1:
            t[j] = max(v, np.float32(0.0))
        elif activation == 2:
            t[j] = np.float32(0.5) * v * (np.float32(1.0) + math.erf(v * SQRT_HALF))
        elif activation == 3:
            t[j] = np.float32(0.5) * v * (np.float32(1.0) + np.tanh(SQRT_2_PI * (v + GELU_CUBE * v * v * v)))
        elif activation == 4:
            t[j] = v / (np.float32(1.0) + np.exp(-v))
        elif activation == 5:
            t[j] = np.tanh(v)


@njit(fastmath=FASTMATH, cache=True)
def _layer_norm(h, gamma, beta, out):
    """out = gamma (h - mean) / sqrt(variance + eps) + beta; all [size]."""
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


@njit(inline="always")
def _view(address, offset, size):
    """`size` floats at an offset in floats from an address."""
    return carray(_float_pointer(address + np.int64(4) * offset), (size,))


@njit(fastmath=FASTMATH, cache=True)
def _branch(h, y, address, entry, weight, t, scratch):
    """y [out] += weight N(U act(D M(h) + d) + u), laid out as `bank.Packed` says; t and scratch are room to work in."""
    offset, rank, flags = entry[0], entry[1], entry[2]
    size_in, size_out = h.shape[0], y.shape[0]
    a = carray(_float_pointer(address + np.int64(4) * offset), (rank, size_in))
    offset += rank * size_in
    b = carray(_float_pointer(address + np.int64(4) * offset), (rank, size_out))
    offset += rank * size_out
    if flags == 0:  # a LoRA
        _down(h, a, t)
        _up(t, b, weight, y)
        return
    d, u = _view(address, offset, rank), _view(address, offset + rank, size_out)
    offset += rank + size_out
    if flags & NORM_BEFORE:
        _layer_norm(h, _view(address, offset, size_in), _view(address, offset + size_in, size_in), scratch)
        offset += 2 * size_in
        _down(scratch, a, t)
    else:
        _down(h, a, t)
    for j in range(rank):
        t[j] += d[j]
    _activate(t[:rank], flags & ACTIVATION)
    if flags & NORM_AFTER:
        for o in range(size_out):
            scratch[o] = u[o]
        _up(t, b, np.float32(1.0), scratch)
        _layer_norm(scratch, _view(address, offset, size_out), _view(address, offset + size_out, size_out), scratch)
        for o in range(size_out):
            y[o] += weight * scratch[o]
    else:
        for o in range(size_out):
            y[o] += weight * u[o]
        _up(t, b, weight, y)


@njit(parallel=True, cache=True)
def branches(x, stream, y, row_hats, hat_slots, hat_weights, addresses, table, biases, max_rank):
    """y [T, out] += what the branches and biases of a row's hats compute from x [T, in], stream [T, out] or y itself.

    Row t wears hats row_hats[t] : row_hats[t + 1]. table [slots, 3] = (offset in floats, rank, flags) and biases
    [slots, 3] = (offset, size, 0) of this site. Those of y come last, one after another.
    """
    for row in prange(y.shape[0]):
        t, scratch = np.empty(max_rank, np.float32), np.empty(y.shape[1], np.float32)
        for hat in range(row_hats[row], row_hats[row + 1]):
            slot, weight = hat_slots[hat], hat_weights[hat]
            if biases[slot, 1] > 0:
                bias = _view(addresses[slot], biases[slot, 0], y.shape[1])
                for o in range(y.shape[1]):
                    y[row, o] += weight * bias[o]
            if table[slot, 1] > 0 and not table[slot, 2] & OF_OUTPUT:
                if table[slot, 2] & OF_STREAM:
                    _branch(stream[row], y[row], addresses[slot], table[slot], weight, t, scratch)
                else:
                    _branch(x[row], y[row], addresses[slot], table[slot], weight, t, scratch)
        for hat in range(row_hats[row], row_hats[row + 1]):
            slot = hat_slots[hat]
            if table[slot, 1] > 0 and table[slot, 2] & OF_OUTPUT:
                _branch(y[row], y[row], addresses[slot], table[slot], hat_weights[hat], t, scratch)


@njit(parallel=True, fastmath=FASTMATH, cache=True)
def scale(y, row_hats, hat_slots, hat_weights, addresses, table):
    """y [T, size] *= 1 + weight (v - 1) for each of a row's hats; table [slots, 3] = (offset, size, 0)."""
    for row in prange(y.shape[0]):
        for hat in range(row_hats[row], row_hats[row + 1]):
            slot, weight = hat_slots[hat], hat_weights[hat]
            if table[slot, 1] > 0:
                v = _view(addresses[slot], table[slot, 0], y.shape[1])
                for i in range(y.shape[1]):
                    y[row, i] *= v[i] + (np.float32(1.0) - weight) * (np.float32(1.0) - v[i])


@njit(parallel=True, cache=True)
def deltas(x, y, row_hats, hat_slots, hat_weights, addresses, table):
    """y [T, out] += weight dW x for each of a row's hats, dW [out, in] at table [slots, 3] = (offset, size, 0).

    A thread takes a few outputs of all rows, so that what it reads of dW is used by all rows that wear it.
    """
    size_in, size_out = x.shape[1], y.shape[1]
    for tile in prange((size_out + TILE - 1) // TILE):
        first, last = tile * TILE, min(size_out, (tile + 1) * TILE)
        t = np.empty(TILE, np.float32)
        for row in range(y.shape[0]):
            for hat in range(row_hats[row], row_hats[row + 1]):
                slot = hat_slots[hat]
                if table[slot, 1] > 0:
                    start = addresses[slot] + np.int64(4) * (table[slot, 0] + first * size_in)
                    _down(x[row], carray(_float_pointer(start), (last - first, size_in)), t)
                    for o in range(first, last):
                        y[row, o] += hat_weights[hat] * t[o - first]
