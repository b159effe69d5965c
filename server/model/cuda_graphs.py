"""Decode steps as CUDA graphs: one launch for a whole forward where every row is one token. Not run on a GPU yet.

A graph is of a number of rows and of blocks, both rounded up to a power of two: rows that are missing repeat the last
one, which writes the same keys and values to the same place once more. Steps in which an adapter acts are not replayed:
what is computed then depends on which row uses what.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from server.core import Row
from server.model.attention.kv_cache import KVCache
from server.model.attention.paged_batch import PagedBatch, spans_of
from server.model.backends.base import GraphBackend, Spans
from server.model.errors import UnsupportedBaseError

Forward = Callable[[Tensor, Tensor, Tensor, PagedBatch], Tensor]
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]  # -> replay, and where its result lies
WARM_UPS = 3
NO_SPANS = Spans([], np.zeros((0, 0), np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))


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
    """The graphs of one base. `forward` is the base's, over rows that use nothing that acts."""

    def __init__(self, forward: Forward, cache: KVCache, capture: Capture = capture_on_cuda) -> None:
        """Raises `UnsupportedBaseError` if the cache's backend has no layout that can be recorded."""
        if not isinstance(cache.backend, GraphBackend):
            raise UnsupportedBaseError(f"the {cache.backend.name} backend has no CUDA graphs: leave --cuda-graphs out")
        self._backend: GraphBackend = cache.backend
        self._forward, self._cache, self._capture = forward, cache, capture
        self._graphs: dict[tuple[int, int], tuple[Tensor, Callable[[], object], Tensor]] = {}

    @staticmethod
    def can_run(rows: list[Row]) -> bool:
        """Whether every row is one token that is sampled, and scores none."""
        return all(len(row.tokens) == 1 and row.sampling is not None and row.num_logits == 1 for row in rows)

    def run(self, rows: list[Row]) -> Tensor:
        """Return the logits [rows, vocabulary] of a decode step, which the next one overwrites."""
        num_rows, max_blocks = _rounded(len(rows)), max(row.start for row in rows) // self._cache.block_size + 1
        key = num_rows, _rounded(max_blocks)
        host = self._inputs(rows + rows[-1:] * (num_rows - len(rows)), key[1])
        if key not in self._graphs:
            inputs = host.to(self._cache.copies.device, copy=True)
            self._graphs[key] = (inputs, *self._capture(lambda: self._compute(inputs, *key)))
        inputs, replay, out = self._graphs[key]
        inputs.copy_(self._cache.copies.pin(host), non_blocking=True)
        replay()
        return out[: len(rows)]

    def _inputs(self, rows: list[Row], num_blocks: int) -> Tensor:
        """Return [rows, 3 + columns] on the host: token, position, wanted row, and the columns of the layout."""
        spans = spans_of(rows, self._cache.block_size)
        numbers = [(max(row.tokens[0], 0), row.start, index) for index, row in enumerate(rows)]
        layout = self._backend.graph_columns(spans, num_blocks, self._cache.block_size)
        return torch.cat([torch.tensor(numbers), layout], 1)

    def _compute(self, inputs: Tensor, num_rows: int, num_blocks: int) -> Tensor:
        """Run the forward of what `inputs` holds then, as `_inputs` laid it out."""
        tokens, positions, wanted, *_ = columns = inputs.view(num_rows, -1).T.contiguous()
        layout = self._backend.graph_layout(columns[3:], num_blocks)
        return self._forward(tokens, positions, wanted, PagedBatch(self._cache, NO_SPANS, layout))


def _rounded(number: int) -> int:
    """Return the power of two that is at least this."""
    return 1 << (number - 1).bit_length()
