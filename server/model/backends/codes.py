"""Numbers that stand for names where kernels cannot take names: kinds, flags, activations, gates, columns.

Compiled kernels have them built in: `cpu` keeps what it compiled under the digest of this file, too.
"""

from __future__ import annotations

# The kinds of primitives, in the order in which they act.
SCALE_IN, SCALE_OUT, DELTA, ROWS, PROJECTION, BIAS = KINDS = range(6)

# Columns of a slot's table [kinds, sites, slots, 3]: offset in bytes, size (0 where nothing acts), flags.
OFFSET, SIZE, FLAGS = 0, 1, 2

# Columns of the tiles of `RowAdapters` [n, 4].
FIRST, COUNT, FIRST_ADAPTER, LAST_ADAPTER = 0, 1, 2, 3

# Activations of a bottleneck, by the names of `adapters_store.primitives.ACTIVATIONS`.
NO_ACTIVATION, RELU, GELU, GELU_TANH, SILU, TANH = 0, 1, 2, 3, 4, 5
ACTIVATION_CODES = {
    "none": NO_ACTIVATION,
    "relu": RELU,
    "gelu": GELU,
    "gelu_tanh": GELU_TANH,
    "silu": SILU,
    "tanh": TANH,
}

# Flags of a projection: its activation's code, then bits. No flag at all is a LoRA.
ACTIVATION_MASK, IS_BIASED, NORM_BEFORE, NORM_AFTER, OF_OUTPUT, OF_STREAM = 15, 16, 32, 64, 128, 256
SOURCE_FLAGS = {"input": 0, "output": OF_OUTPUT, "stream": OF_STREAM}

# Activations of a gated feed-forward block, by the names of transformers' ACT2FN.
RELU_GATE, SILU_GATE, GELU_TANH_GATE = 0, 1, 2
GATE_CODES = {"relu": RELU_GATE, "silu": SILU_GATE, "gelu_pytorch_tanh": GELU_TANH_GATE}
