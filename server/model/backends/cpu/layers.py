"""Compute norms, gates and argmax row by row, so that no row depends on another."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from server.model.backends.codes import RELU_GATE, SILU_GATE
from server.model.backends.cpu.attention import exp_of_negative
from server.model.backends.cpu.threads import FASTMATH
from server.model.backends.cpu.vector import at, largest

SQRT_8_PI, GELU_CUBE = np.float32((8 / np.pi) ** 0.5), np.float32(0.044715)
BLOCK = 256  # logits that are looked at together
ONE, ZERO = np.float32(1.0), np.float32(0.0)


@njit(fastmath=FASTMATH, cache=True)
def _norm_row(x, weight, eps, out):
    total = ZERO
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    inverse = ONE / np.sqrt(total / np.float32(x.shape[0]) + eps)
    for i in range(x.shape[0]):
        out[i] = weight[i] * (x[i] * inverse)


@njit(parallel=True, cache=True)
def _norm_rows(x, weight, eps, out):
    for row in prange(x.shape[0]):
        _norm_row(x[row], weight, eps, out[row])


@njit(cache=True)
def rms_norm(x, weight, eps, out):
    """Write out = weight * x / sqrt(mean(x^2) + eps), row by row of x [T, size] (arXiv:1910.07467)."""
    if x.shape[0] == 1:  # to call the other threads takes longer
        _norm_row(x[0], weight, eps, out[0])
    else:
        _norm_rows(x, weight, eps, out)


@njit(inline="always", fastmath=FASTMATH)
def _sigmoid(v):
    e = exp_of_negative(-abs(v))
    return (ONE if v >= ZERO else e) / (ONE + e)


@njit(fastmath=FASTMATH, cache=True)
def _gate_row(gate_up, activation, out):
    size = out.shape[0]
    if activation == RELU_GATE:
        for i in range(size):
            out[i] = max(gate_up[i], ZERO) * gate_up[size + i]
    elif activation == SILU_GATE:
        for i in range(size):
            out[i] = gate_up[i] * _sigmoid(gate_up[i]) * gate_up[size + i]
    else:
        for i in range(size):
            g = gate_up[i]
            activated = _sigmoid(SQRT_8_PI * (g + GELU_CUBE * g * g * g))
            out[i] = g * activated * gate_up[size + i]


@njit(parallel=True, cache=True)
def _gate_rows(gate_up, activation, out):
    for row in prange(out.shape[0]):
        _gate_row(gate_up[row], activation, out[row])


@njit(cache=True)
def gate(gate_up, activation, out):
    """Write out [T, n] = act(g) u of gate_up [T, 2n] = (g, u); `activation` is one of `codes.GATE_CODES`."""
    if out.shape[0] == 1:
        _gate_row(gate_up[0], activation, out[0])
    else:
        _gate_rows(gate_up, activation, out)


@njit(cache=True)
def _add_row(x, y, out):
    for i in range(x.shape[0]):
        out[i] = x[i] + y[i]


@njit(parallel=True, cache=True)
def _add_rows(x, y, out):
    for row in prange(x.shape[0]):
        _add_row(x[row], y[row], out[row])


@njit(cache=True)
def add(x, y, out):
    """Write out = x + y, row by row."""
    if x.shape[0] == 1:
        _add_row(x[0], y[0], out[0])
    else:
        _add_rows(x, y, out)


@njit(fastmath=FASTMATH, cache=True)
def _is_finite(x):
    total = ZERO
    for i in range(x.shape[0]):
        total += x[i] * ZERO  # a NaN of what is not finite
    return total == ZERO


@njit(parallel=True, cache=True)
def best(logits, out):
    """Write the place of the largest of each row of logits [R, n], the first of equals, or -1 if one is not finite."""
    size = logits.shape[1]
    for row in prange(logits.shape[0]):
        top, begun = -np.inf, 0
        for begin in range(0, size, BLOCK):
            value = largest(at(logits) + 4 * (row * size + begin), min(BLOCK, size - begin))
            if value > top:
                top, begun = value, begin
        place = begun
        while place < size and logits[row, place] < top:
            place += 1
        out[row] = place if _is_finite(logits[row]) else -1
