"""Which hats the rows of a step wear, laid out for kernels, and in runs of rows that wear the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Worn:
    """Which hats each of some rows wears: row t wears [row_hats[t] : row_hats[t + 1]] of (slots, weights)."""

    row_hats: NDArray[np.int64]
    slots: NDArray[np.int64]
    weights: NDArray[np.float32]

    def repeated(self, times: int) -> Worn:
        """Each row `times` times: for sites that see the heads of a token as rows of their own."""
        if times == 1:
            return self
        rows = [slice(first, last) for first, last in zip(self.row_hats[:-1], self.row_hats[1:], strict=True)]
        return wear([tuple(zip(self.slots[row], self.weights[row], strict=True)) for row in rows for _ in range(times)])


def wear(hats: list[tuple[tuple[int, float], ...]]) -> Worn:
    """Lay out the (slot, weight) lists of rows."""
    flat = [hat for row in hats for hat in row]
    return Worn(
        np.cumsum([0, *map(len, hats)], dtype=np.int64),
        np.array([slot for slot, _ in flat], np.int64),
        np.array([weight for _, weight in flat], np.float32),
    )


NOTHING = wear([])


def runs(worn: Worn) -> list[tuple[int, int, list[tuple[int, float]]]]:
    """Segments: (first row, last row + 1, hats) of neighbouring rows that wear the same."""
    segments: list[tuple[int, int, list[tuple[int, float]]]] = []
    for row in range(len(worn.row_hats) - 1):
        span = slice(worn.row_hats[row], worn.row_hats[row + 1])
        hats = list(zip(worn.slots[span].tolist(), worn.weights[span].tolist(), strict=True))
        if segments and segments[-1][2] == hats:
            segments[-1] = (segments[-1][0], row + 1, hats)
        else:
            segments.append((row, row + 1, hats))
    return segments
