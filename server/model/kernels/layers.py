"""Norms and gates: row by row, so that no row depends on another."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from server.model.kernels.attention import exp_of_negative
from server.model.kernels.threads import FASTMATH

GATES = {"relu": 0, "silu": 1, "gelu_pytorch_tanh": 2}  # the names of transformers' ACT2FN
SQRT_8_PI, GELU_CUBE = np.float32((8 / np.pi) ** 0.5), np.float32(0.044715)
ONE, ZERO = np.float32(1.0), np.float32(0.0)


@njit(parallel=True, fastmath=FASTMATH, cache=True)
def rms_norm(x, weight, eps, out):
    """out = weight * x / sqrt(mean(x^2) + eps), row by row of x [T, size] (arXiv:1910.07467)."""
    for row in prange(x.shape[0]):
        total = ZERO
        for i in range(x.shape[1]):
            total += x[row, i] * x[row, i]
        inverse = ONE / np.sqrt(total / np.float32(x.shape[1]) + eps)
        for i in range(x.shape[1]):
            out[row, i] = weight[i] * (x[row, i] * inverse)


@njit(inline="always", fastmath=FASTMATH)
def _sigmoid(v):
    e = exp_of_negative(-abs(v))
    return (ONE if v >= ZERO else e) / (ONE + e)


@njit(parallel=True, fastmath=FASTMATH, cache=True)
def gate(gate_up, activation, out):
    """out [T, n] = act(g) u of gate_up [T, 2n] = (g, u); `activation` is one of `GATES`."""
    size = out.shape[1]
    for row in prange(out.shape[0]):
        if activation == 0:
            for i in range(size):
                out[row, i] = max(gate_up[row, i], ZERO) * gate_up[row, size + i]
        elif activation == 1:
            for i in range(size):
                out[row, i] = gate_up[row, i] * _sigmoid(gate_up[row, i]) * gate_up[row, size + i]
        else:
            for i in range(size):
                g = gate_up[row, i]
                turned = _sigmoid(SQRT_8_PI * (g + GELU_CUBE * g * g * g))
                out[row, i] = g * turned * gate_up[row, size + i]
