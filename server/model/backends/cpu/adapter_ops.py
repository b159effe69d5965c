"""The adapters in the slots of one base, by the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from server.model.backends.codes import OFFSET, ROWS
from server.model.backends.cpu import adapters
from server.model.backends.cpu.adapters import AdapterArgs
from server.model.backends.cpu.loops import ItemType
from server.model.row_adapters import Acts, RowAdapters, SiteGroup


@dataclass(frozen=True)
class PreparedRows:
    """Adapters that rows of a step use, and the same as the kernels take it."""

    rows: RowAdapters
    acts: Acts
    args: AdapterArgs


class CpuAdapterOps:
    """Runs the kernels over slots that lie in the host's memory. `item_type` says what matrices are kept in."""

    def __init__(self, item_type: ItemType) -> None:
        self._item_type = item_type
        self._addresses = np.zeros(0, np.int64)  # by slot
        self._row_ids: dict[int, dict[int, NDArray[np.int32]]] = {}  # by slot and site

    def insert(self, slot: int, buffer: Tensor, row_ids: dict[int, Tensor]) -> None:
        """Note the address of a slot's buffer, which the slots keep alive."""
        if slot >= len(self._addresses):
            self._addresses = np.concatenate([self._addresses, np.zeros(slot + 1, np.int64)])
        self._addresses[slot] = buffer.data_ptr()
        self._row_ids[slot] = {site: ids.numpy() for site, ids in row_ids.items()}

    def drop(self, slot: int) -> None:
        """Forget the address of a slot's buffer."""
        self._addresses[slot] = 0
        del self._row_ids[slot]

    def prepare(
        self, tokens: RowAdapters, sampled: RowAdapters, acts: Acts, table: NDArray[np.int64]
    ) -> tuple[PreparedRows, PreparedRows]:
        """Gather the kernels' arguments, for all tokens and for the sampled rows."""
        return self._prepare(tokens, acts, table), self._prepare(sampled, acts, table)

    def _prepare(self, rows: RowAdapters, acts: Acts, table: NDArray[np.int64]) -> PreparedRows:
        of_rows = rows.tiles, rows.slots, rows.weights
        return PreparedRows(
            rows, acts, AdapterArgs(*of_rows, self._addresses, table, acts.array, acts.max_rank, *self._item_type)
        )

    def scale_input(self, site: int, x: Tensor, prepared: PreparedRows) -> None:
        """Scale the input x [rows, in] of a site in place."""
        adapters.enter(x.numpy(), site, prepared.args)

    def apply(self, group: SiteGroup, x: Tensor, stream: Tensor, y: Tensor, prepared: PreparedRows) -> None:
        """Change y [rows, out] in place by all that acts at a group's sites."""
        rows, args = prepared.rows, prepared.args
        if len(y) != rows.num_rows:
            rows = rows.repeated(len(y) // rows.num_rows)
            args = args._replace(tiles=rows.tiles)
        adapters.apply(x.numpy(), stream.numpy(), y.numpy(), group, args)
        if prepared.acts.of_group[group.number][ROWS]:
            for span, slot, weight in self._with_rows(int(group.sites[0]), rows):
                self._run_rows(adapters.head_rows, x[span], y[span], int(group.sites[0]), slot, weight, args)

    def embed_rows(self, site: int, token_ids: Tensor, y: Tensor, prepared: PreparedRows) -> None:
        """Change the embeddings y [T, size] of token_ids [T] in place where adapters changed rows."""
        for span, slot, weight in self._with_rows(site, prepared.rows):
            self._run_rows(adapters.embed_rows, token_ids[span], y[span], site, slot, weight, prepared.args)

    def _with_rows(self, site: int, rows: RowAdapters) -> Iterator[tuple[slice, int, float]]:
        """Yield the rows whose adapters change rows of the embedding or the head: (span, slot, weight) of each."""
        for span, slot_weights in rows.segments():
            yield from ((span, slot, weight) for slot, weight in slot_weights if site in self._row_ids[slot])

    def _run_rows(
        self, kernel: Any, x: Tensor, y: Tensor, site: int, slot: int, weight: float, args: AdapterArgs
    ) -> None:
        address = self._addresses[slot] + args.table[ROWS, site, slot, OFFSET]
        kernel(x.numpy(), y.numpy(), self._row_ids[slot][site], address, np.float32(weight), self._item_type)
