"""The layout of one step's rows over the blocks of the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from server.core import Row
from server.model.attention.kv_cache import KVCache
from server.model.backends.base import Layout, Spans


@dataclass
class PagedBatch:
    """Rows of one step, as the attention sees them: their places in the cache, and the backend's layout of those."""

    cache: KVCache
    spans: Spans
    layout: Layout


def spans_of(rows: list[Row], block_size: int) -> Spans:
    """Return the places of the rows' tokens in their blocks."""
    spans, token_blocks, token_offsets, first = [], list[int](), list[int](), 0
    table = np.zeros((len(rows), max(len(row.blocks) for row in rows)), np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row.blocks)] = row.blocks
        positions = range(row.start, row.start + len(row.tokens))
        token_blocks += [row.blocks[position // block_size] for position in positions]
        token_offsets += [position % block_size for position in positions]
        spans.append((first, len(row.tokens), row.start))
        first += len(row.tokens)
    return Spans(spans, table, np.array(token_blocks, np.int64), np.array(token_offsets, np.int64))


def page(rows: list[Row], cache: KVCache, num_threads: int) -> PagedBatch:
    """Lay the rows of a step out for the attention."""
    spans = spans_of(rows, cache.block_size)
    layout = cache.backend.lay_out(spans, cache.block_size, cache.shapes[0].num_kv_heads, num_threads)
    return PagedBatch(cache, spans, layout)
