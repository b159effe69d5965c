"""The reference backend: torch's own operations, on any device and in any type."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from adapters_store.base.spec import KVShape
from server.model.backends.attention_params import AttentionParams, KVLayer, split
from server.model.backends.base import AdapterOps, DecoderLayer, Linear, Spans, WholeDecoder
from server.model.backends.codes import GELU_TANH_GATE, RELU_GATE, SILU_GATE
from server.model.backends.reference import Find, best_reference, linear_reference, store_reference
from server.model.backends.torch_ops import attention
from server.model.backends.torch_ops.adapters import StackedAdapterOps
from server.model.backends.torch_ops.attention import Padded
from server.model.backends.torch_ops.copies import DeviceCopies
from server.model.precision import StorageDtypes, choose_storage_dtypes

GATES = {
    RELU_GATE: functional.relu,
    SILU_GATE: functional.silu,
    GELU_TANH_GATE: lambda g: functional.gelu(g, approximate="tanh"),
}


class TorchOpsBackend:
    """Weights, adapters, cache and activations in one type; rows are near, not equal, alone and in a batch."""

    name = "torch"

    def __init__(self, precision: str, device: str, dtypes: StorageDtypes | None = None) -> None:
        self.precision, self.device = precision, device
        self.dtypes = choose_storage_dtypes(precision, device) if dtypes is None else dtypes

    @cached_property
    def copies(self) -> DeviceCopies:
        """The copies to this device; made when they are first needed, for they start CUDA."""
        return DeviceCopies(self.device)

    def set_num_threads(self, num_threads: int) -> None:
        """Compute with so many threads on the host."""
        torch.set_num_threads(num_threads)

    def wake(self) -> None:
        """Do nothing: no kernels are compiled here."""

    def rounded(self, weight: Tensor) -> Tensor:
        """Return the weight itself: the model was read in the type that is computed with."""
        return weight

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Return torch's own linear layer."""
        return linear_reference(weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise x [..., size] in fp32."""
        return functional.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)

    def gate(self, gate_up: Tensor, gate: int) -> Tensor:
        """Return act(g) u [..., n] of gate_up [..., 2n] = (g, u)."""
        left, right = gate_up.chunk(2, -1)
        return GATES[gate](left) * right

    def block_shapes(self, shape: KVShape, block_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return keys [kv heads, dim, block_size] and values [kv heads, block_size, dim]."""
        heads = shape.num_kv_heads
        return (heads, shape.key_dim, block_size), (heads, block_size, shape.value_dim)

    def store_kv(self, layer: KVLayer, blocks: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
        """Write keys and values of given positions."""
        store_reference(layer, blocks, offsets, key, value)

    def lay_out(self, spans: Spans, block_size: int, _num_kv_heads: int, _num_threads: int) -> Padded:
        """Pad the sequences of a step in groups of about equal numbers of queries."""
        return attention.lay_out(spans, block_size, self.copies)

    def attend(
        self, layout: Padded, layer: KVLayer, qkv: Tensor, cos: Tensor, sin: Tensor, params: AttentionParams
    ) -> Tensor:
        """Store k and v, and attend: a few calls of SDPA."""
        parts = split(qkv, layer.shape, cos, sin)
        store_reference(layer, layout.token_blocks, layout.token_offsets, *parts[1:])
        return attention.attend(layout, parts, layer, params)

    def adapters(self, find: Find) -> AdapterOps:
        """Make the operations of one base's slots, which stack what `find` finds."""
        return StackedAdapterOps(find, self.dtypes.others, self.copies)

    def whole_decoder(self, _layers: Sequence[DecoderLayer]) -> WholeDecoder | None:
        """Return None: layers are computed part by part."""
        return None

    def best_tokens(self, logits: Tensor) -> Tensor:
        """Return the first of the largest of each row, -1 if one is not finite."""
        return best_reference(logits)

    def graph_columns(self, spans: Spans, num_blocks: int, block_size: int) -> Tensor:
        """Return the layout of a decode step on the host, see `GraphBackend`."""
        return attention.graph_columns(spans, num_blocks, block_size)

    def graph_layout(self, columns: Tensor, num_blocks: int) -> Padded:
        """Return the layout that reads such columns."""
        return attention.graph_layout(columns, num_blocks)
