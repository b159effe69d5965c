"""The KV cache: blocks of keys and values for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from adapters_store.base.spec import KVShape
from adapters_store.primitives import PrefixKV
from server.model.backends.attention_params import KVLayer
from server.model.backends.base import Backend


def _empty(sizes: Sequence[tuple[int, ...]], like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return a tensor for each layer, and the stacks that they are of: one, if all are of one size.

    Pages that were never written cost no memory: empty, not zeros.
    """
    if len(set(sizes)) == 1:
        stack = like.new_empty(len(sizes), *sizes[0])
        return list(stack), [stack]
    layers = [like.new_empty(size) for size in sizes]
    return layers, [layer[None] for layer in layers]


class KVCache:
    """Blocks of keys and values on a backend's device, in the type that it keeps matrices in.

    Per layer keys and values [num_blocks, ...] of the shapes that the backend says; `layers` has both by layer.
    """

    def __init__(self, shapes: list[KVShape], num_blocks: int, block_size: int, backend: Backend) -> None:
        self.shapes, self.num_blocks, self.block_size = shapes, num_blocks, block_size
        self.backend, self.copies = backend, backend.copies
        like = torch.empty(0, dtype=backend.dtypes.matrices, device=backend.device)
        blocks = [backend.block_shapes(shape, block_size) for shape in shapes]
        self.keys, of_keys = _empty([(num_blocks, *keys) for keys, _ in blocks], like)
        self.values, of_values = _empty([(num_blocks, *values) for _, values in blocks], like)
        self._stacks = [*of_keys, *of_values]  # [layers, num_blocks, ...]
        parts = zip(self.keys, self.values, shapes, strict=True)
        self.layers = [KVLayer(keys, values, block_size, shape) for keys, values, shape in parts]

    def copy(self, source: int, target: int) -> None:
        """Copy a whole block."""
        for stack in self._stacks:
            stack[:, target] = stack[:, source]

    def write(self, blocks: list[int], first: int, prefix: PrefixKV, span: slice) -> None:
        """Write a span of a prefix's positions to the positions from `first` of a sequence in `blocks`."""
        positions = np.arange(first, first + span.stop - span.start)
        block, offset = self.copies.send(
            np.array(blocks, np.int64)[positions // self.block_size], positions % self.block_size
        )
        for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            self.store(layer, block, offset, key[span], value[span])

    def store(self, layer: int, block: Tensor, offset: Tensor, key: Tensor, value: Tensor) -> None:
        """Write keys [n, kv heads, dim] and values of n positions, given as blocks and the places in them."""
        self.backend.store_kv(self.layers[layer], block, offset, key, value)

    @staticmethod
    def block_bytes(shapes: list[KVShape], block_size: int, backend: Backend) -> int:
        """Return the bytes that one block takes over all layers."""
        blocks = [backend.block_shapes(shape, block_size) for shape in shapes]
        return backend.dtypes.matrices.itemsize * sum(prod(keys) + prod(values) for keys, values in blocks)
