"""What the hats of a step do, in torch ops, for devices that have no kernel of ours. Not run on a GPU yet.

The matrices of all slots that are worn are stacked at true ranks: every row is multiplied by all of them, and what is
not its own is dropped in between. On a GPU that is a few small products at a site, however many hats there are, and
nothing depends on which rows wear what but the numbers of one matrix, which is sent once a step. Stacks are kept while
the same slots are worn: they take as much memory again as these. What is rare (`Delta`, `Rows`, `Bottleneck`, scales of
several hats in one row) is computed by segments of rows that wear the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store.primitives import Bias, LowRank, Primitive, Scale
from server.model.backends.base import BIAS, DELTA, PROJECTION, ROWS, SCALE_OUT
from server.model.backends.torch_ops.copies import Copies
from server.model.row_adapters import RowAdapters

GroupArrays = tuple[int, NDArray[np.int64], NDArray[np.int64]]  # as the bank's: its number, sites, columns
Find = Callable[[int, int, int], Primitive | None]  # (kind, site, slot)
StackColumns = tuple[tuple[int, int], ...]  # (which of the step's slots, how many columns it has)


@dataclass(frozen=True)
class Stack:
    """Matrices [n, size] side by side, and whose each is."""

    matrix: Tensor
    columns: StackColumns


@dataclass(frozen=True)
class Stacks:
    """At a group: A of all its sites [sum of ranks, in]; per site B [its ranks, out], biases, and if there is more."""

    a: Stack | None
    b: list[Tensor | None]
    biases: list[Stack | None]
    has_more: list[bool]


@dataclass
class Side:
    """The rows of a step, or those that are sampled: `weights` [rows, slots] of what each wears, else 0."""

    weights: Tensor
    masks: dict[tuple[StackColumns, int], tuple[Tensor, Tensor]]


class Stacked:
    """Computes what the slots do in which `find` finds primitives.

    `scale` and `update` do by segments what is not stacked: they are the bank's references.
    """

    def __init__(
        self, find: Find, dtype: torch.dtype, copies: Copies, scale: Callable[..., None], update: Callable[..., None]
    ) -> None:
        self.find, self.dtype, self.copies = find, dtype, copies
        self._scale_by_segment, self._update_by_segment = scale, update
        self._slots: list[int] = []
        self._stacks: dict[int, Stacks] = {}  # by the number of a group
        self._factors: dict[tuple[int, int], Stack | None] = {}  # by kind and site
        self._sides: dict[bool, Side] = {}
        self._is_single = True  # no row wears two hats

    def invalidate(self) -> None:
        """A slot or a group came or went."""
        self._stacks.clear()
        self._factors.clear()

    def set_batch(self, tokens: RowAdapters, sampled: RowAdapters) -> None:
        """What the next forward's rows wear."""
        slots = sorted(set(tokens.slots.tolist()))
        if slots != self._slots:
            self._slots = slots
            self.invalidate()
        self._is_single = all(last == first + 1 for _, _, first, last in tokens.tiles.tolist())
        if slots:
            sent = self.copies.send(*(self._matrix(row_adapters) for row_adapters in (tokens, sampled)))
            self._sides = {
                is_head: Side(part.to(self.dtype), {}) for is_head, part in zip((False, True), sent, strict=True)
            }

    def _matrix(self, row_adapters: RowAdapters) -> NDArray[np.float32]:
        weights = np.zeros((row_adapters.num_rows, len(self._slots)), np.float32)
        for span, adapters in row_adapters.segments():
            for slot, weight in adapters:
                weights[span, self._slots.index(slot)] += weight
        return weights

    def scale(self, kind: int, site: int, y: Tensor, row_adapters: RowAdapters, is_head: bool) -> None:
        """y [rows, size] *= 1 + w (v - 1), each row by its own."""
        if (kind, site) not in self._factors:
            self._factors[kind, site] = self._stack(kind, site, Scale, lambda primitive: (primitive.v - 1)[None])
        factors = self._factors[kind, site]
        if factors is not None and not self._is_single:
            self._scale_by_segment(kind, site, y, row_adapters)
        elif factors is not None:
            y *= 1 + self._mask(factors.columns, len(y), is_head)[0] @ factors.matrix

    def apply(self, group: GroupArrays, x: Tensor, y: Tensor, row_adapters: RowAdapters, is_head: bool) -> None:
        """Change y [rows, out] by all that is worn at the sites of a group, whose input is x [rows, in]."""
        number, sites, columns = group
        if number not in self._stacks:
            self._stacks[number] = self._stacks_of(sites.tolist())
        stacks = self._stacks[number]
        inner, first = self._inner(stacks.a, x, is_head), 0
        for part, site in enumerate(sites.tolist()):
            mine = y[:, int(columns[part]) : int(columns[part + 1])]
            self.scale(SCALE_OUT, site, mine, row_adapters, is_head)
            b, biases = stacks.b[part], stacks.biases[part]
            if b is not None and inner is not None:
                mine.addmm_(inner[:, first : first + len(b)], b)
                first += len(b)
            if biases is not None:
                mine.addmm_(self._mask(biases.columns, len(y), is_head)[0], biases.matrix)
            for span, adapters in row_adapters.segments() if stacks.has_more[part] else ():
                self._update_by_segment(site, x[span], mine[span], span, adapters, but=(LowRank, Bias))

    def _inner(self, a: Stack | None, x: Tensor, is_head: bool) -> Tensor | None:
        """w A x [rows, ranks], and 0 where a row does not wear it: also where a stranger's A x is not finite."""
        if a is None:
            return None
        mask, is_bare = self._mask(a.columns, len(x), is_head)
        return ((x @ a.matrix.T) * mask).masked_fill(is_bare, 0.0)

    def _mask(self, columns: StackColumns, num_rows: int, is_head: bool) -> tuple[Tensor, Tensor]:
        """The weights [rows, columns] of what rows wear, and where they are 0. Sites that are alike share them."""
        side = self._sides[is_head]
        if (columns, num_rows) not in side.masks:
            weights = side.weights
            if num_rows != len(weights):  # the heads of a token are rows of their own
                weights = weights.repeat_interleave(num_rows // len(weights), 0)
            mask = torch.cat([weights[:, slot : slot + 1].expand(-1, count) for slot, count in columns], 1)
            side.masks[columns, num_rows] = mask, mask == 0
        return side.masks[columns, num_rows]

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
        """What the worn slots have of a kind at a site."""
        found = [(number, self.find(kind, site, slot)) for number, slot in enumerate(self._slots)]
        parts = [(number, matrix(primitive)) for number, primitive in found if isinstance(primitive, wanted)]
        if not parts:
            return None
        return Stack(torch.cat([part for _, part in parts]), tuple((number, len(part)) for number, part in parts))

    def _has_more(self, site: int) -> bool:
        primitives = [self.find(kind, site, slot) for kind in (DELTA, ROWS, PROJECTION) for slot in self._slots]
        return any(primitive is not None and not isinstance(primitive, LowRank) for primitive in primitives)
