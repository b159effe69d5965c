"""Attention over a paged KV cache, as one function that transformers' modules call.

`install` registers it under the name `manyhats` with transformers' attention interface. What a step looks like
(`PagedBatch`) reaches it as the keyword argument `paged` of the model's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adapters_store.patch import PrefixKV
from adapters_store.spec import KVShape
from server.model import kernels, padded
from server.model.batch import Row
from server.model.copies import Copies
from server.model.kernels import attention
from server.model.kernels.vector import whole_panels
from server.model.packed import Kept

NAME = "manyhats"
NO_TILES = np.zeros((0, 5), np.int64), np.zeros(1, np.int64)


class UnsupportedBaseError(Exception):
    """The base does something that this server cannot do rightly; the sentence says what."""


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
        self, shapes: list[KVShape], num_blocks: int, block_size: int, kept: Kept, device: str = "cpu"
    ) -> None:
        self.shapes, self.num_blocks, self.block_size = shapes, num_blocks, block_size
        self.has_kernels = kernels.serve(device, kept.others)
        self.copies, like = Copies(device), torch.empty(0, dtype=kept.matrices, device=device)
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


@dataclass
class PagedBatch:
    """One step's rows, as the attention sees them. T tokens of S sequences."""

    cache: KVCache
    spans: list[tuple[int, int, int]]  # per sequence: first token in the batch, number of tokens, first position
    block_table: NDArray[np.int64]  # [S, blocks of the longest]
    token_blocks: NDArray[np.int64]  # [T] the block that each token's K and V go to
    token_offsets: NDArray[np.int64]  # [T] and the place in it
    tiles: NDArray[np.int64]  # [n, 5] = sequence, kv head, first token, number of tokens, first position
    bounds: NDArray[np.int64]  # [threads + 1] the tiles of each thread
    padded: padded.Padded | None = None  # the same for devices without our kernels

    def arrays(self) -> tuple[NDArray[np.int64], ...]:
        """What the kernel of attention takes of it."""
        return self.token_blocks, self.token_offsets, self.block_table, self.tiles, self.bounds


def spans_of(
    rows: list[Row], block_size: int
) -> tuple[list[tuple[int, int, int]], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The spans, the block table, and each token's block and its place there, as `PagedBatch` has them."""
    spans, token_blocks, token_offsets, first = [], list[int](), list[int](), 0
    table = np.zeros((len(rows), max(len(row.blocks) for row in rows)), np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row.blocks)] = row.blocks
        positions = range(row.start, row.start + len(row.tokens))
        token_blocks += [row.blocks[position // block_size] for position in positions]
        token_offsets += [position % block_size for position in positions]
        spans.append((first, len(row.tokens), row.start))
        first += len(row.tokens)
    return spans, table, np.array(token_blocks, np.int64), np.array(token_offsets, np.int64)


def page(rows: list[Row], cache: KVCache, num_threads: int) -> PagedBatch:
    """Lay the rows of a step out for the attention."""
    spans, table, blocks, offsets = spans_of(rows, cache.block_size)
    if not cache.has_kernels:
        laid_out = padded.lay_out(spans, table, blocks, offsets, cache.block_size, cache.copies)
        return PagedBatch(cache, spans, table, blocks, offsets, *NO_TILES, laid_out)
    tiles, bounds = _balance(spans, cache.shapes[0].num_kv_heads, num_threads)
    return PagedBatch(cache, spans, table, blocks, offsets, tiles, bounds)


def _balance(
    spans: list[tuple[int, int, int]], num_kv_heads: int, num_threads: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut the queries into tiles, and deal them to the threads, heaviest first, to the least loaded."""
    tiles = [
        (sequence, head, first + done, min(attention.MAX_TOKENS, count - done), start + done)
        for sequence, (first, count, start) in enumerate(spans)
        for done in range(0, count, attention.MAX_TOKENS)
        for head in range(num_kv_heads)
    ]
    hands: list[list[tuple[int, ...]]] = [[] for _ in range(num_threads)]
    loads = [0] * num_threads
    for tile in sorted(tiles, key=lambda t: -t[3] * (t[4] + t[3])):
        least = loads.index(min(loads))
        hands[least].append(tile)
        loads[least] += tile[3] * (tile[4] + tile[3])
    dealt = np.array([tile for hand in hands for tile in hand], np.int64)
    return dealt, np.cumsum([0, *map(len, hands)])


@dataclass(frozen=True)
class Manner:
    """How one layer attends: the factor of scores, how many positions a query sees (0: all), the soft cap (0: none)."""

    scaling: float
    window: int = 0
    cap: float = 0.0

    def numbers(self) -> tuple[np.float32, int, np.float32]:
        """As the kernels take them."""
        return np.float32(self.scaling), self.window, np.float32(self.cap)


def attend(batch: PagedBatch, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, manner: Manner) -> Tensor:
    """Store k and v, and attend: qkv [T, heads * d + kv heads * (d + d_v)] -> [T, heads, d_v].

    cos and sin [T, rotated d] turn queries and keys; [T, 0] where the base does not turn them, or has done so.
    """
    cache, shape = batch.cache, batch.cache.shapes[layer]
    if not kernels.serve(qkv.device.type, qkv.dtype):
        return _attend_torch(batch, layer, qkv, cos, sin, manner)
    out = qkv.new_empty(len(qkv), num_heads(qkv.shape[1], shape), shape.value_dim)
    attention.attend(
        qkv.numpy(),
        cos.numpy(),
        sin.numpy(),
        *cache.arrays(layer),
        cache.block_size,
        *batch.arrays(),
        manner.numbers(),
        out.numpy(),
    )
    return out


def num_heads(width: int, shape: KVShape) -> int:
    """Query heads in qkv [T, width]."""
    return (width - shape.num_kv_heads * (shape.key_dim + shape.value_dim)) // shape.key_dim


def _split(qkv: Tensor, shape: KVShape, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query [T, heads, d], key [T, kv heads, d] and value [T, kv heads, d_v], the first two turned."""
    heads = num_heads(qkv.shape[1], shape)
    sizes = [heads * shape.key_dim, shape.num_kv_heads * shape.key_dim, shape.num_kv_heads * shape.value_dim]
    query, key, value = (part.unflatten(1, (n, -1)) for part, n in zip(
        qkv.split(sizes, 1), (heads, shape.num_kv_heads, shape.num_kv_heads), strict=True
    ))  # fmt: skip
    return rotate_reference(query, cos, sin), rotate_reference(key, cos, sin), value


def _attend_torch(batch: PagedBatch, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, manner: Manner) -> Tensor:
    """In torch ops over padded sequences, on devices that have no kernel of ours."""
    cache, laid_out = batch.cache, batch.padded
    if laid_out is None:
        raise TypeError("a batch of another device")
    parts = _split(qkv, cache.shapes[layer], cos, sin)
    cache.store(layer, laid_out.token_blocks, laid_out.token_offsets, *parts[1:])
    of_layer = cache.keys[layer], cache.values[layer], cache.block_size
    return padded.attend(laid_out, parts, *of_layer, manner.scaling, manner.window, manner.cap)


def attend_reference(batch: PagedBatch, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, manner: Manner) -> Tensor:
    """The slow twin of `attend`, in plain torch on any device: gather each sequence's K and V, softmax(q k^T) v."""
    cache, shape, device = batch.cache, batch.cache.shapes[layer], qkv.device
    query, key, value = _split(qkv, shape, cos, sin)
    heads = query.shape[1]
    blocks = torch.from_numpy(batch.token_blocks).to(device)
    cache.store(layer, blocks, torch.from_numpy(batch.token_offsets).to(device), key, value)
    out = []
    for sequence, (first, count, start) in enumerate(batch.spans):
        length = start + count
        table = torch.from_numpy(batch.block_table[sequence, : -(-length // cache.block_size)]).to(device)
        k = cache.keys[layer][table, :, :, : cache.block_size].permute(0, 3, 1, 2).flatten(0, 1)[:length]
        v = cache.values[layer][table, :, :, : shape.value_dim].transpose(1, 2).flatten(0, 1)[:length]
        k, v = k.to(query.dtype), v.to(query.dtype)
        k, v = (part.repeat_interleave(heads // shape.num_kv_heads, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query[first : first + count], k).float() * manner.scaling
        if manner.cap:
            scores = manner.cap * torch.tanh(scores / manner.cap)
        distance = torch.arange(start, length, device=device)[:, None] - torch.arange(length, device=device)
        hidden = (distance < 0) | (distance >= (manner.window or length))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(out)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first dimensions of x [T, heads, d] by cos, sin [T, turned], halves against each other (RoPE).

    arXiv:2104.09864.
    """
    turned, rest = x[..., : cos.shape[1]], x[..., cos.shape[1] :]
    left, right = turned.chunk(2, -1)
    turned = turned * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]
    return torch.cat([turned, rest], -1)


class Probe:
    """Stands in for a `PagedBatch` to learn from one forward how each layer attends, whatever the config calls it."""

    def __init__(self) -> None:
        self.shapes: dict[int, KVShape] = {}
        self.manners: dict[int, Manner] = {}

    def see(self, layer: int, query: Tensor, key: Tensor, value: Tensor, manner: Manner) -> Tensor:
        """Note the shapes of query [T, H, d], key and value [T, kv heads, d]; answer zeros."""
        self.shapes[layer] = KVShape(key.shape[1], key.shape[2], value.shape[2])
        self.manners[layer] = manner
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])


HARMLESS = {
    "dropout",
    "is_causal",
    "position_ids",
    "output_attentions",
    "use_cache",
    "cache_position",
    "head_mask",
    "output_router_logits",
}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: PagedBatch | Probe | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q [1, H, T, d], k and v [1, kv heads, T, d] -> [1, T, H, d_v]."""
    unknown = sorted(name for name, thing in other.items() if thing is not None and name not in HARMLESS)
    if paged is None or attention_mask is not None or unknown:
        raise UnsupportedBaseError(
            f"{type(module).__name__} calls attention with "
            + (", ".join(unknown) or ("a mask of its own" if paged is not None else "no `paged` argument"))
            + ", which this server does not know"
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    manner = Manner(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window or 0, softcap or 0.0)
    if isinstance(paged, Probe):
        return paged.see(layer, q, k, v, manner)[None], None
    qkv = torch.cat([part.flatten(1) for part in (q, k, v)], 1)
    not_turned = qkv.new_empty(len(qkv), 0)
    return attend(paged, layer, qkv, not_turned, not_turned, manner)[None], None


def install() -> None:
    """Register `manyhats` with transformers: the attention, and the mask that it does not need."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)
