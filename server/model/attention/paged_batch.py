"""The layout of one step's rows over the blocks of the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.core import Row
from server.model.attention.kv_cache import KVCache
from server.model.backends.cpu import attention as cpu_attention
from server.model.backends.torch_ops import attention as torch_attention

NO_TILES = np.zeros((0, 5), np.int64), np.zeros(1, np.int64)


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
    padded: torch_attention.Padded | None = None  # the same for devices without our kernels

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
        laid_out = torch_attention.lay_out(spans, table, blocks, offsets, cache.block_size, cache.copies)
        return PagedBatch(cache, spans, table, blocks, offsets, *NO_TILES, laid_out)
    tiles, bounds = _balance(spans, cache.shapes[0].num_kv_heads, num_threads)
    return PagedBatch(cache, spans, table, blocks, offsets, tiles, bounds)


def _balance(
    spans: list[tuple[int, int, int]], num_kv_heads: int, num_threads: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut the queries into tiles, and deal them to the threads, heaviest first, to the least loaded."""
    tiles = [
        (sequence, head, first + done, min(cpu_attention.MAX_TOKENS, count - done), start + done)
        for sequence, (first, count, start) in enumerate(spans)
        for done in range(0, count, cpu_attention.MAX_TOKENS)
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
