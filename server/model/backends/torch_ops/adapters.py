"""The adapters in the slots of one base in torch ops, for any device. Not run on a GPU yet.

The matrices of all slots that a step uses are stacked at true ranks: every row is multiplied by all of them, and what
is not its own is dropped in between. On a GPU that is a few small products at a site, however many adapters there are,
and nothing depends on which rows use what but the numbers of one matrix, which is sent once a step. Stacks are kept
while the same slots are used: they take as much memory again as these. What is rare (`Delta`, `Rows`, `Bottleneck`,
scales of several adapters in one row) is computed by segments of rows that use the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store.primitives import Bias, LowRank, Rows, Scale
from server.model.backends.base import Copies
from server.model.backends.codes import BIAS, DELTA, PROJECTION, ROWS, SCALE_IN, SCALE_OUT
from server.model.backends.reference import Find, embed_rows_reference, scale_reference, update_reference
from server.model.row_adapters import Acts, RowAdapters, SiteGroup

StackColumns = tuple[tuple[int, int], ...]  # (which of the step's slots, how many columns it has)


@dataclass(frozen=True)
class Stack:
    """Matrices [n, size] side by side, and to which slot each belongs."""

    matrix: Tensor
    columns: StackColumns


@dataclass(frozen=True)
class Stacks:
    """Stacks of a group: A of all its sites [sum of ranks, in]; per site B [its ranks, out], biases, if there is more.

    `has_more` says that a site has primitives that are not stacked.
    """

    a: Stack | None
    b: list[Tensor | None]
    biases: list[Stack | None]
    has_more: list[bool]


@dataclass(frozen=True)
class StackedRows:
    """Rows of a step, all or those that are sampled: `weights` [rows, slots] of what each uses, else 0."""

    rows: RowAdapters
    weights: Tensor
    is_single: bool  # no row uses two adapters
    masks: dict[tuple[StackColumns, int], tuple[Tensor, Tensor]] = field(default_factory=dict)


class StackedAdapterOps:
    """Computes what the slots do in which `find` finds primitives; `dtype` is that of activations."""

    def __init__(self, find: Find, dtype: torch.dtype, copies: Copies) -> None:
        self.find, self.dtype, self.copies = find, dtype, copies
        self._slots: list[int] = []
        self._stacks: dict[int, Stacks] = {}  # by the number of a group
        self._factors: dict[tuple[int, int], Stack | None] = {}  # by kind and site

    def insert(self, _slot: int, _buffer: Tensor, _row_ids: dict[int, Tensor]) -> None:
        """Drop the stacks: one of their slots may be another now."""
        self._invalidate()

    def drop(self, _slot: int) -> None:
        """Drop the stacks: one of their slots is free."""
        self._invalidate()

    def _invalidate(self) -> None:
        self._stacks.clear()
        self._factors.clear()

    def prepare(
        self, tokens: RowAdapters, sampled: RowAdapters, _acts: Acts, _table: NDArray[np.int64]
    ) -> tuple[StackedRows, StackedRows]:
        """Send the weights of all rows to the device; new stacks are made as they are needed."""
        slots = sorted(set(tokens.slots.tolist()))
        if slots and slots != self._slots:  # between steps, and in steps without adapters, the stacks stay
            self._slots = slots
            self._invalidate()
        is_single = all(last == first + 1 for _, _, first, last in tokens.tiles.tolist())
        sides = tokens, sampled
        sent = self.copies.send(*map(self._matrix, sides)) if slots else [torch.empty(0, 0)] * 2
        all_tokens, of_head = (
            StackedRows(rows, weights.to(self.dtype), is_single) for rows, weights in zip(sides, sent, strict=True)
        )
        return all_tokens, of_head

    def _matrix(self, rows: RowAdapters) -> NDArray[np.float32]:
        weights = np.zeros((rows.num_rows, len(self._slots)), np.float32)
        for span, adapters in rows.segments():
            for slot, weight in adapters:
                weights[span, self._slots.index(slot)] += weight
        return weights

    def scale_input(self, site: int, x: Tensor, prepared: StackedRows) -> None:
        """Scale the input x [rows, in] of a site in place."""
        self._scale(SCALE_IN, site, x, prepared)

    def _scale(self, kind: int, site: int, y: Tensor, prepared: StackedRows) -> None:
        """Multiply y [rows, size] by 1 + w (v - 1), each row by its own."""
        if (kind, site) not in self._factors:
            self._factors[kind, site] = self._stack(kind, site, Scale, lambda primitive: (primitive.v - 1)[None])
        factors = self._factors[kind, site]
        if factors is not None and not prepared.is_single:
            scale_reference(self.find, kind, site, y, _repeated(prepared.rows, y))
        elif factors is not None:
            y *= 1 + _mask(factors.columns, len(y), prepared)[0] @ factors.matrix

    def apply(self, group: SiteGroup, x: Tensor, stream: Tensor, y: Tensor, prepared: StackedRows) -> None:
        """Change y [rows, out] by all that acts at the sites of a group, whose input is x [rows, in]."""
        if group.number not in self._stacks:
            self._stacks[group.number] = self._stacks_of(group.sites.tolist())
        stacks, first = self._stacks[group.number], 0
        inner = _inner(stacks.a, x, prepared)
        for part, site in enumerate(group.sites.tolist()):
            mine = y[:, int(group.columns[part]) : int(group.columns[part + 1])]
            self._scale(SCALE_OUT, site, mine, prepared)
            b, biases = stacks.b[part], stacks.biases[part]
            if b is not None and inner is not None:
                mine.addmm_(inner[:, first : first + len(b)], b)
                first += len(b)
            if biases is not None:
                mine.addmm_(_mask(biases.columns, len(y), prepared)[0], biases.matrix)
            for span, adapters in _repeated(prepared.rows, y).segments() if stacks.has_more[part] else ():
                update_reference(self.find, site, x[span], stream[span], mine[span], adapters, (LowRank, Bias))

    def embed_rows(self, site: int, token_ids: Tensor, y: Tensor, prepared: StackedRows) -> None:
        """Change the embeddings y [T, size] of token_ids [T] in place where adapters changed rows."""
        for span, slot_weights in prepared.rows.segments():
            for slot, weight in slot_weights:
                if isinstance(rows := self.find(ROWS, site, slot), Rows):
                    embed_rows_reference(rows, token_ids[span], y[span], weight)

    def _stacks_of(self, sites: list[int]) -> Stacks:
        a = [self._stack(PROJECTION, site, LowRank, lambda primitive: primitive.a) for site in sites]
        b = [self._stack(PROJECTION, site, LowRank, lambda primitive: primitive.b.T) for site in sites]
        present = [stack for stack in a if stack is not None]
        columns = tuple(column for stack in present for column in stack.columns)
        return Stacks(
            Stack(torch.cat([stack.matrix for stack in present]), columns) if present else None,
            [None if stack is None else stack.matrix for stack in b],
            [self._stack(BIAS, site, Bias, lambda primitive: primitive.b[None]) for site in sites],
            [self._has_more(site) for site in sites],
        )

    def _stack(self, kind: int, site: int, wanted: type, matrix: Callable[..., Tensor]) -> Stack | None:
        """Stack what the step's slots have of a kind at a site."""
        found = [(number, self.find(kind, site, slot)) for number, slot in enumerate(self._slots)]
        parts = [(number, matrix(primitive)) for number, primitive in found if isinstance(primitive, wanted)]
        if not parts:
            return None
        return Stack(torch.cat([part for _, part in parts]), tuple((number, len(part)) for number, part in parts))

    def _has_more(self, site: int) -> bool:
        primitives = [self.find(kind, site, slot) for kind in (DELTA, ROWS, PROJECTION) for slot in self._slots]
        return any(primitive is not None and not isinstance(primitive, LowRank) for primitive in primitives)


def _repeated(rows: RowAdapters, y: Tensor) -> RowAdapters:
    """Return the rows so many times as y [rows, size] has each: the heads of a token are rows of their own."""
    return rows if len(y) == rows.num_rows else rows.repeated(len(y) // rows.num_rows)


def _inner(a: Stack | None, x: Tensor, prepared: StackedRows) -> Tensor | None:
    """Compute w A x [rows, ranks], 0 if a row does not use it: also if a stranger's A x is not finite."""
    if a is None:
        return None
    mask, is_bare = _mask(a.columns, len(x), prepared)
    return ((x @ a.matrix.T) * mask).masked_fill(is_bare, 0.0)


def _mask(columns: StackColumns, num_rows: int, prepared: StackedRows) -> tuple[Tensor, Tensor]:
    """Return the weights [rows, columns] of what rows use, and a mask of the zeros. Sites that are alike share them."""
    if (columns, num_rows) not in prepared.masks:
        weights = prepared.weights
        if num_rows != len(weights):  # the heads of a token are rows of their own
            weights = weights.repeat_interleave(num_rows // len(weights), 0)
        mask = torch.cat([weights[:, slot : slot + 1].expand(-1, count) for slot, count in columns], 1)
        prepared.masks[columns, num_rows] = mask, mask == 0
    return prepared.masks[columns, num_rows]
