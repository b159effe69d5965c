"""The KV cache: blocks of keys and values for each layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store.base.spec import KVShape
from adapters_store.primitives import PrefixKV
from server.model.backends import cpu
from server.model.backends.cpu.vector import whole_panels
from server.model.backends.torch_ops.copies import Copies
from server.model.precision import StorageDtypes


def _empty(sizes: Sequence[tuple[int, ...]], like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """A tensor for each layer, and the stacks that they are of: one, if all are of one size.

    Pages that were never written cost no memory: empty, not zeros.
    """
    if len(set(sizes)) == 1:
        stack = like.new_empty(len(sizes), *sizes[0])
        return list(stack), [stack]
    layers = [like.new_empty(size) for size in sizes]
    return layers, [layer[None] for layer in layers]


class KVCache:
    """Blocks of keys and values on one device, in the type that a bank keeps matrices in.

    Per layer keys [num_blocks, kv heads, dim, width], whose positions lie side by side, and values [num_blocks,
    kv heads, block_size, depth]: width and depth are block_size and the values' dim in whole panels.
    """

    def __init__(
        self, shapes: list[KVShape], num_blocks: int, block_size: int, dtypes: StorageDtypes, device: str = "cpu"
    ) -> None:
        self.shapes, self.num_blocks, self.block_size = shapes, num_blocks, block_size
        self.has_kernels = cpu.supports(device, dtypes.others)
        self.copies, like = Copies(device), torch.empty(0, dtype=dtypes.matrices, device=device)
        width = whole_panels(block_size)
        self.keys, of_keys = _empty([(num_blocks, s.num_kv_heads, s.key_dim, width) for s in shapes], like)
        sizes = [(num_blocks, s.num_kv_heads, block_size, whole_panels(s.value_dim)) for s in shapes]
        self.values, of_values = _empty(sizes, like)
        self._stacks = [*of_keys, *of_values]  # [layers, num_blocks, ...]

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
        self.keys[layer][block, :, :, offset] = key.to(self.keys[layer].dtype)
        self.values[layer][block, :, offset, : value.shape[-1]] = value.to(self.values[layer].dtype)

    def arrays(self, layer: int) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
        """A layer's keys and values as the kernels take them; halves by their bits, see `vector`."""
        keys, values = self.keys[layer].numpy(), self.values[layer].numpy()
        return (keys.view(np.uint16), values.view(np.uint16)) if keys.dtype == np.float16 else (keys, values)

    @staticmethod
    def block_bytes(shapes: list[KVShape], block_size: int, item_bytes: int) -> int:
        """Bytes that one block takes over all layers."""
        return item_bytes * sum(
            s.num_kv_heads * (s.key_dim * whole_panels(block_size) + block_size * whole_panels(s.value_dim))
            for s in shapes
        )
