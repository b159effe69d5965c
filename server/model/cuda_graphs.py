"""Decode steps as CUDA graphs: one launch for a whole forward where every row is one token. Not run on a GPU yet.

A graph is of a number of rows and of blocks, both rounded up to a power of two: rows that are missing repeat the last
one, which writes the same keys and values to the same place once more. Steps in which a hat acts are not replayed: what
is computed then depends on who wears what.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from server.core import Row
from server.model.attention.kv_cache import KVCache
from server.model.attention.paged_batch import PagedBatch, spans_of
from server.model.backends.torch_ops.attention import Padded, QueryGroup, lay_out
from server.model.backends.torch_ops.copies import Copies

Forward = Callable[[Tensor, Tensor, Tensor, PagedBatch], Tensor]
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]  # -> replay, and where its result lies
WARM_UPS = 3


def capture_on_cuda(compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Record what a computation launches, after it has run on a side stream, as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compute()
    return graph.replay, out


class DecodeGraphs:
    """The graphs of one base. `forward` is the base's, over rows that wear nothing that acts."""

    def __init__(self, forward: Forward, cache: KVCache, capture: Capture = capture_on_cuda) -> None:
        self._forward, self._cache, self._capture = forward, cache, capture
        self._graphs: dict[tuple[int, int], tuple[Tensor, Callable[[], object], Tensor]] = {}

    @staticmethod
    def can_run(rows: list[Row]) -> bool:
        """Whether every row is one token that is sampled."""
        return all(len(row.tokens) == 1 and row.sampling is not None for row in rows)

    def run(self, rows: list[Row]) -> Tensor:
        """The logits [rows, vocabulary] of a decode step, which the next one overwrites."""
        num_rows, max_blocks = _rounded(len(rows)), max(row.start for row in rows) // self._cache.block_size + 1
        key = num_rows, _rounded(max_blocks)
        host = _inputs(rows + rows[-1:] * (num_rows - len(rows)), key[1], self._cache.block_size)
        if key not in self._graphs:
            inputs = host.to(self._cache.copies.device, copy=True)
            self._graphs[key] = (inputs, *self._capture(lambda: self._compute(inputs, *key)))
        inputs, replay, out = self._graphs[key]
        inputs.copy_(self._cache.copies.pin(host), non_blocking=True)
        replay()
        return out[: len(rows)]

    def _compute(self, inputs: Tensor, num_rows: int, num_blocks: int) -> Tensor:
        """The forward of what `inputs` holds then, as `_inputs` laid it out."""
        columns = inputs.view(num_rows, -1).T.contiguous()
        tokens, positions, wanted, blocks, offsets, places, queries, lengths = columns[:8]
        group = QueryGroup(queries[:, None], positions[:, None], lengths, columns[8 : 8 + num_blocks].T)
        nowhere = np.zeros((0, 0), np.int64)
        paged = PagedBatch(
            self._cache, [], nowhere, nowhere, nowhere, nowhere, nowhere, Padded(blocks, offsets, places, [group])
        )
        return self._forward(tokens, positions, wanted, paged)


def _inputs(rows: list[Row], num_blocks: int, block_size: int) -> Tensor:
    """[rows, 8 + blocks]: token, position, wanted, block, offset, place, query, length, and the blocks of each row."""
    spans, table, blocks, offsets = spans_of(rows, block_size)
    laid_out = lay_out(spans, table, blocks, offsets, block_size, Copies("cpu"))
    (group,) = laid_out.groups
    token_ids, order = torch.tensor([max(row.tokens[0], 0) for row in rows]), torch.arange(len(rows))
    columns = [token_ids, group.positions[:, 0], order, laid_out.token_blocks, laid_out.token_offsets]
    columns += [laid_out.places, group.tokens[:, 0], group.lengths]
    padded = torch.zeros(len(rows), num_blocks, dtype=torch.int64)
    padded[:, : group.table.shape[1]] = group.table
    return torch.cat([torch.stack(columns, 1), padded], 1)


def _rounded(number: int) -> int:
    """The power of two that is at least this."""
    return 1 << (number - 1).bit_length()
