"""Attention over a paged KV cache, as one function that transformers' modules call.

`install` registers it under the name `manyhats` with transformers' attention interface. What a step looks like
(`PagedBatch`) reaches it as the keyword argument `paged` of the model's forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adapters_store.patch import PrefixKV
from adapters_store.spec import KVShape
from server.model import kernels
from server.model.batch import Row

NAME = "manyhats"
TILE = 16  # most queries a tile: K/V blocks are reused from cache, and two cores still balance over 3 kv heads


class UnsupportedBaseError(Exception):
    """The base does something that this server cannot do rightly; the sentence says what."""


class KVCache:
    """Blocks of keys and values, in one dtype on one device.

    Per layer keys [num_blocks, kv heads, dim, block_size], whose positions lie side by side, and values [num_blocks,
    kv heads, block_size, dim].
    """

    def __init__(self, shapes: list[KVShape], num_blocks: int, block_size: int, like: Tensor) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        # Pages that were never written cost no memory: empty, not zeros.
        self.keys = [like.new_empty(num_blocks, s.num_kv_heads, s.key_dim, block_size) for s in shapes]
        self.values = [like.new_empty(num_blocks, s.num_kv_heads, block_size, s.value_dim) for s in shapes]

    def copy(self, source: int, target: int) -> None:
        """Copy a whole block."""
        for part in (*self.keys, *self.values):
            part[target] = part[source]

    def write(self, blocks: list[int], first: int, prefix: PrefixKV, span: slice) -> None:
        """Write a span of a prefix's positions to the positions from `first` of a sequence in `blocks`."""
        positions = torch.arange(first, first + span.stop - span.start)
        block, offset = torch.tensor(blocks)[positions // self.block_size], positions % self.block_size
        for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            self.keys[layer][block, :, :, offset] = key[span].to(self.keys[layer].dtype)
            self.values[layer][block, :, offset] = value[span].to(self.values[layer].dtype)

    @staticmethod
    def block_bytes(shapes: list[KVShape], block_size: int, item_bytes: int) -> int:
        """Bytes that one block takes over all layers."""
        return sum(s.num_kv_heads * (s.key_dim + s.value_dim) for s in shapes) * block_size * item_bytes


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


def page(rows: list[Row], cache: KVCache, num_kv_heads: int, num_threads: int) -> PagedBatch:
    """Lay the rows of a step out for the attention."""
    spans, token_blocks, token_offsets, first = [], [], [], 0
    table = np.zeros((len(rows), max(len(row.blocks) for row in rows)), np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row.blocks)] = row.blocks
        positions = np.arange(row.start, row.start + len(row.tokens))
        token_blocks.append(table[index, positions // cache.block_size])
        token_offsets.append(positions % cache.block_size)
        spans.append((first, len(row.tokens), row.start))
        first += len(row.tokens)
    tiles, bounds = _balance(spans, num_kv_heads, num_threads)
    return PagedBatch(cache, spans, table, np.concatenate(token_blocks), np.concatenate(token_offsets), tiles, bounds)


def _balance(
    spans: list[tuple[int, int, int]], num_kv_heads: int, num_threads: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut the queries into tiles, and deal them to the threads, heaviest first, to the least loaded."""
    tiles = [
        (sequence, head, first + done, min(TILE, count - done), start + done)
        for sequence, (first, count, start) in enumerate(spans)
        for done in range(0, count, TILE)
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


def attend(
    batch: PagedBatch, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int, cap: float
) -> Tensor:
    """Store k, v and attend. query [T, H, d], key [T, kv heads, d], value [T, kv heads, d_v] -> [T, H, d_v].

    `window` is the number of positions that a query sees, itself included (0: all); `cap` the soft cap (0: none).
    """
    if query.device.type != "cpu" or query.dtype != torch.float32:
        return attend_reference(batch, layer, query, key, value, scaling, window, cap)
    keys, values = batch.cache.keys[layer].numpy(), batch.cache.values[layer].numpy()
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    kernels.store(
        keys,
        values,
        key.contiguous().numpy(),
        value.contiguous().numpy(),
        batch.token_blocks,
        batch.token_offsets,
    )
    kernels.attend(
        query.contiguous().numpy(),
        keys,
        values,
        batch.block_table,
        batch.tiles,
        batch.bounds,
        np.float32(scaling),
        window,
        np.float32(cap),
        out.numpy(),
    )
    return out


def attend_reference(
    batch: PagedBatch, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int, cap: float
) -> Tensor:
    """The slow twin of `attend`, in plain torch on any device: gather each sequence's K and V, softmax(q k^T) v."""
    keys, values, device = batch.cache.keys[layer], batch.cache.values[layer], query.device
    blocks = torch.from_numpy(batch.token_blocks).to(device)
    offsets = torch.from_numpy(batch.token_offsets).to(device)
    keys[blocks, :, :, offsets], values[blocks, :, offsets] = key, value
    group = query.shape[1] // keys.shape[1]
    out = []
    for sequence, (first, count, start) in enumerate(batch.spans):
        length = start + count
        table = torch.from_numpy(batch.block_table[sequence, : -(-length // batch.cache.block_size)]).to(device)
        k = keys[table].permute(0, 3, 1, 2).flatten(0, 1)[:length].repeat_interleave(group, 1)
        v = values[table].transpose(1, 2).flatten(0, 1)[:length].repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", query[first : first + count], k).float() * scaling
        if cap:
            scores = cap * torch.tanh(scores / cap)
        distance = torch.arange(start, length, device=device)[:, None] - torch.arange(length, device=device)
        hidden = (distance < 0) | (distance >= (window or length))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(out)


class ShapeProbe:
    """Stands in for a `PagedBatch` to learn each layer's shape from one forward, whatever the config calls it."""

    def __init__(self) -> None:
        self.shapes: dict[int, KVShape] = {}

    def see(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Note the shapes of query [T, H, d], key and value [T, kv heads, d]; answer zeros."""
        self.shapes[layer] = KVShape(key.shape[1], key.shape[2], value.shape[2])
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
    paged: PagedBatch | ShapeProbe | None = None,
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
    if isinstance(paged, ShapeProbe):
        return paged.see(layer, q, k, v)[None], None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(paged, layer, q, k, v, scale, sliding_window or 0, softcap or 0.0)[None], None


def install() -> None:
    """Register `manyhats` with transformers: the attention, and the mask that it does not need."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)
