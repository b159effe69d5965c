"""The CPU backend: Numba kernels, whose results for a row are the same bits whatever it is computed beside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adapters_store.base.spec import KVShape
from server.model.backends.attention_params import AttentionParams, KVLayer, num_heads
from server.model.backends.base import AdapterOps, DecoderLayer, Linear, Spans, WholeDecoder
from server.model.backends.cpu import attention, layers, threads
from server.model.backends.cpu.adapter_ops import CpuAdapterOps
from server.model.backends.cpu.attention import AttentionTiles, KernelParams
from server.model.backends.cpu.copies import HostCopies
from server.model.backends.cpu.forks import LaunchedThreads
from server.model.backends.cpu.layout import lay_out
from server.model.backends.cpu.loops import item_type
from server.model.backends.cpu.vector import whole_panels
from server.model.backends.cpu.weights import PACKERS, rounded
from server.model.backends.cpu.whole_decoder import CpuWholeDecoder, kernel_params, kv_arrays
from server.model.backends.reference import Find, store_reference
from server.model.precision import choose_storage_dtypes

ITEM_TYPES = {torch.float32: np.float32, torch.float16: np.uint16}  # of matrices and of the KV cache, see `vector`


class CpuBackend:
    """Weights in 32, 16 or 8 bits by `precision` (fp32, fp16, int8), arithmetic and activations in fp32."""

    name, device = "cpu", "cpu"

    def __init__(self, precision: str) -> None:
        self.precision, self.copies = precision, HostCopies()
        self.dtypes = choose_storage_dtypes(precision, "cpu")
        self._launched = LaunchedThreads()

    def set_num_threads(self, num_threads: int) -> None:
        """Give torch and Numba the same number of threads, which in a forked process begin anew."""
        self._launched.renew()
        threads.set_num_threads(num_threads)

    def wake(self) -> None:
        """Register in a thread what kernels may use: rounding keeps the cores busy meanwhile, and not Python."""
        threads.wake()

    def rounded(self, weight: Tensor) -> Tensor:
        """Return what a product keeps of a weight [out, in]; see `weights.rounded`."""
        return rounded(weight, self.precision)

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Pack a weight [out, in] into panels in the precision's bits."""
        return PACKERS[self.precision](weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise x [..., size] row by row."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = torch.empty_like(rows)
        layers.rms_norm(rows.numpy(), weight.numpy(), np.float32(eps), out.numpy())
        return out.view(x.shape)

    def gate(self, gate_up: Tensor, gate: int) -> Tensor:
        """Return act(g) u [..., n] of gate_up [..., 2n] = (g, u), row by row."""
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        layers.gate(gate_up.view(-1, gate_up.shape[-1]).numpy(), gate, out.view(-1, out.shape[-1]).numpy())
        return out

    def block_shapes(self, shape: KVShape, block_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return keys [kv heads, dim, width], whose positions lie side by side, and values [kv heads, size, depth].

        Width and depth are block_size and the values' dim in whole panels.
        """
        keys = shape.num_kv_heads, shape.key_dim, whole_panels(block_size)
        return keys, (shape.num_kv_heads, block_size, whole_panels(shape.value_dim))

    def store_kv(self, layer: KVLayer, blocks: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
        """Write keys and values of given positions."""
        store_reference(layer, blocks, offsets, key, value)

    def lay_out(self, spans: Spans, _block_size: int, num_kv_heads: int, num_threads: int) -> AttentionTiles:
        """Deal tiles of queries to the threads."""
        return lay_out(spans, num_kv_heads, num_threads)

    def attend(
        self, layout: AttentionTiles, layer: KVLayer, qkv: Tensor, cos: Tensor, sin: Tensor, params: AttentionParams
    ) -> Tensor:
        """Store k and v, and attend: one call for all tokens of a step."""
        out = qkv.new_empty(len(qkv), num_heads(qkv.shape[1], layer.shape), layer.shape.value_dim)
        how = KernelParams(*kernel_params(params))
        keys, values = kv_arrays(layer)
        of_cache, kept = (keys, values, layer.block_size), item_type(keys.dtype)
        attention.attend(qkv.numpy(), cos.numpy(), sin.numpy(), *of_cache, layout, how, out.numpy(), kept)
        return out

    def adapters(self, _find: Find) -> AdapterOps:
        """Make the operations of one base's slots; the kernels read the slots' memory themselves."""
        return CpuAdapterOps(item_type(ITEM_TYPES[self.dtypes.matrices]))

    def whole_decoder(self, layers: Sequence[DecoderLayer]) -> WholeDecoder | None:
        """Return all layers as one call."""
        return CpuWholeDecoder(layers)

    def best_tokens(self, logits: Tensor) -> Tensor:
        """Return the first of the largest of each row, -1 if one is not finite."""
        out = torch.empty(len(logits), dtype=torch.int64)
        layers.best(logits.contiguous().numpy(), out.numpy())
        return out
