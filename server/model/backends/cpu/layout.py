"""Lay a step's rows out for the attention kernel: tiles of queries, dealt to the threads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from server.model.backends.base import Spans
from server.model.backends.cpu.attention import MAX_TOKENS, AttentionTiles


def lay_out(spans: Spans, num_kv_heads: int, num_threads: int) -> AttentionTiles:
    """Cut each sequence's queries into tiles of at most `MAX_TOKENS` of one kv head, and deal them to the threads."""
    tiles: list[tuple[int, ...]] = [
        (sequence, head, first + done, min(MAX_TOKENS, count - done), start + done)
        for sequence, (first, count, start) in enumerate(spans.spans)
        for done in range(0, count, MAX_TOKENS)
        for head in range(num_kv_heads)
    ]
    dealt, bounds = _deal(tiles, num_threads)
    return AttentionTiles(spans.token_blocks, spans.token_offsets, spans.block_table, dealt, bounds)


def _deal(tiles: list[tuple[int, ...]], num_threads: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Deal tiles, heaviest first, to the thread with the least to do: all tiles in order, and bounds [threads + 1]."""
    hands: list[list[tuple[int, ...]]] = [[] for _ in range(num_threads)]
    loads = [0] * num_threads
    for tile in sorted(tiles, key=lambda t: -t[3] * (t[4] + t[3])):
        least = loads.index(min(loads))
        hands[least].append(tile)
        loads[least] += tile[3] * (tile[4] + tile[3])
    return np.array([tile for hand in hands for tile in hand], np.int64), np.cumsum([0, *map(len, hands)])
