"""Lay out which adapters the rows of a step use, in tiles of neighbouring rows that use the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_ROWS = 24  # of a tile: whole parts for kernels that take six or four rows at once, and work for every thread
SlotWeights = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RowAdapters:
    """The adapters that each row uses.

    tiles [n, 4] = (first row, number of rows, first adapter, last adapter + 1), for rows that use any; the adapters
    have the slots [adapters] and the weights [adapters].
    """

    num_rows: int
    tiles: NDArray[np.int64]
    slots: NDArray[np.int64]
    weights: NDArray[np.float32]

    def repeated(self, times: int) -> RowAdapters:
        """Return each row `times` times: for sites that see the heads of a token as rows of their own."""
        tiles = self.tiles * np.array([times, times, 1, 1])
        return replace(self, num_rows=times * self.num_rows, tiles=tiles)

    def segments(self) -> Iterator[tuple[slice, list[tuple[int, float]]]]:
        """Yield all neighbouring rows that use the same adapters, with these as (slot, weight)."""
        for (first_adapter, last_adapter), run in groupby(self.tiles.tolist(), lambda tile: tile[2:]):
            tiles, adapters = list(run), slice(first_adapter, last_adapter)
            slot_weights = zip(self.slots[adapters].tolist(), self.weights[adapters].tolist(), strict=True)
            yield slice(tiles[0][0], tiles[-1][0] + tiles[-1][1]), list(slot_weights)


def build_row_adapters(rows: Iterable[tuple[SlotWeights, int]]) -> RowAdapters:
    """Lay out rows, given as adapters and the number of neighbours that use them."""
    runs: list[tuple[SlotWeights, int, int]] = []  # adapters, first row, number of rows
    num_rows = 0
    for adapters, count in rows:
        if runs and runs[-1][0] == adapters:
            runs[-1] = (adapters, runs[-1][1], runs[-1][2] + count)
        elif count:
            runs.append((adapters, num_rows, count))
        num_rows += count
    flat = [adapter for adapters, _, _ in runs for adapter in adapters]
    tiles, end = [], 0
    for adapters, first, count in runs:
        begin, end = end, end + len(adapters)
        if adapters:
            tiles += [(first + at, min(MAX_ROWS, count - at), begin, end) for at in range(0, count, MAX_ROWS)]
    return RowAdapters(
        num_rows,
        np.array(tiles, np.int64).reshape(-1, 4),
        np.array([slot for slot, _ in flat], np.int64),
        np.array([weight for _, weight in flat], np.float32),
    )


NO_ADAPTERS = build_row_adapters([])


class SiteGroup(NamedTuple):
    """Sites that share an input and whose outputs lie side by side: site sites[p] has columns[p] to columns[p + 1]."""

    number: int
    sites: NDArray[np.int64]
    columns: NDArray[np.int64]


@dataclass(frozen=True)
class Acts:
    """Flags of some slots at all groups: whether each kind of primitive acts there, as an array and as tuples."""

    array: NDArray[np.bool_]  # [groups, kinds]
    of_group: list[tuple[bool, ...]]
    max_rank: int
