"""Slots, and what the adapters in them do to a step's rows.

A slot is a packed patch on the device. Rows of the batch name their adapters as (slot, weight); the base's modules hand
their inputs and outputs to the slots, and at a site at which nothing of the step acts that costs one look into a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.primitives import Bias, Delta, LowRank, Patch, Prefix, PrefixEmbeds, Primitive, Scale
from server.core import Row
from server.model.attention.paged_batch import PagedBatch
from server.model.backends.base import Backend
from server.model.backends.codes import KINDS, PROJECTION, ROWS, SCALE_IN, SIZE
from server.model.row_adapters import NO_ADAPTERS, Acts, RowAdapters, SiteGroup, build_row_adapters
from server.model.slots.layout import PackedPatch, Sites, pack, prefix_of, view
from server.model.step_context import StepContext

MIN_SLOTS = 16
MAX_ACTS = 256  # sets of slots whose acts are kept
IDLE = (False,) * len(KINDS)


class AdapterSlots:
    """The slots of one base on a backend's device.

    `step` is what the step that runs computes with; `begin_step` and `end_step` set and clear it. `on_change` is told
    which sites a slot acts at when it comes (1) and goes (-1).
    """

    def __init__(self, spec: BaseSpec, backend: Backend) -> None:
        self.spec, self.sites = spec, Sites(spec)
        self.backend, self.dtypes, self.copies = backend, backend.dtypes, backend.copies
        self.slots: dict[int, PackedPatch] = {}
        self.table = np.zeros((len(KINDS), len(self.sites), MIN_SLOTS, 3), np.int64)
        self.on_change: Callable[[PackedPatch, int], None] = lambda _packed, _change: None
        self._groups: dict[tuple[str, ...], SiteGroup] = {}
        self._members = self._firsts = np.zeros(0, np.int64)  # sites of all groups, and where each group begins there
        self._acts: dict[tuple[int, ...], Acts] = {}  # by the slots that act
        self._ops = backend.adapters(self.primitive)
        self._embedding = self.group(spec.embedding)

    def group(self, *names: str) -> SiteGroup:
        """Return the group of some sites, for `enter` and `apply`; a new one is made at load, between steps only."""
        if names not in self._groups:
            sites = np.array([self.sites.index[name] for name in names], np.int64)
            columns = np.cumsum([0, *(self.sites.widths[site][1] for site in sites)])
            self._groups[names] = SiteGroup(len(self._groups), sites, columns)
            self._members = np.concatenate([group.sites for group in self._groups.values()])
            self._firsts = np.cumsum([0, *(len(group.sites) for group in self._groups.values())])[:-1]
            self._acts.clear()
            self.end_step()
        return self._groups[names]

    def pack(self, patch: Patch) -> PackedPatch:
        """Lay a patch out for a slot; any thread. Raises `ValueError` if a value does not fit."""
        return self.pin(pack(patch, self.sites, self.dtypes))

    def pin(self, packed: PackedPatch) -> PackedPatch:
        """Return the same in memory that the device reads by itself; any thread."""
        row_ids = {site: self.copies.pin(ids) for site, ids in packed.row_ids.items()}
        return replace(packed, buffer=self.copies.pin(packed.buffer), row_ids=row_ids)

    def insert(self, packed: PackedPatch) -> int:
        """Copy into a free slot and return its number; between steps only."""
        slot = next(number for number in range(len(self.slots) + 1) if number not in self.slots)
        if slot >= self.table.shape[2]:
            self.table = np.concatenate([self.table, np.zeros_like(self.table)], 2)
        buffer, *ids = self.copies.start(slot, [packed.buffer, *packed.row_ids.values()])
        self.slots[slot] = replace(packed, buffer=buffer, row_ids=dict(zip(packed.row_ids, ids, strict=True)))
        kind, site, *entry = packed.entries.T
        self.table[kind, site, slot] = np.stack(entry, 1)
        self._ops.insert(slot, buffer, self.slots[slot].row_ids)
        self.on_change(packed, 1)
        self._acts.clear()
        return slot

    def drop(self, slot: int) -> None:
        """Free a slot; between steps only."""
        self.on_change(self.slots.pop(slot), -1)
        self.copies.release(slot)
        self.table[:, :, slot] = 0
        self._ops.drop(slot)
        self._acts.clear()

    def primitive(self, kind: int, site: int, slot: int) -> Primitive | None:
        """Return what a slot's patch does at a site, as views of the slot."""
        entry = self.table[kind, site, slot]
        return view(self.slots[slot], self.sites, kind, site, entry) if entry[SIZE] else None

    def warm_up(self) -> None:
        """Run every operation once: a kernel's first call compiles it, and that must not be a user's."""
        site, linear = next(iter(self.spec.linears.items()))
        zeros = partial(torch.zeros, dtype=self.dtypes.others)
        of_x, of_y = zeros(1, linear.in_features), zeros(1, linear.out_features)
        primitives = (
            Scale(site, zeros(linear.in_features), "input"),
            Scale(site, of_y[0]),
            Delta(site, zeros(linear.out_features, linear.in_features)),
            LowRank(site, of_x, of_y.T),
            Bias(site, of_y[0]),
        )
        slot, group = self.insert(self.pack(Patch("warm-up", "", primitives))), self.group(site)
        try:
            self.begin_step([Row([0], 0, [0], adapters=((slot, 1.0),))])
            x = self.enter(group, of_x.to(self.backend.device))
            self.apply(group, x, of_y.to(self.backend.device, copy=True))
        finally:
            self.end_step()
            self.drop(slot)

    def prefix(self, slot: int) -> Prefix | None:
        """Return the virtual positions of a slot's patch."""
        self.copies.wait(slot)
        return prefix_of(self.slots[slot], self.spec.embedding_size, self.spec.kv)

    def begin_step(self, rows: list[Row], paged: PagedBatch | None = None) -> None:
        """Set what the next forward computes with. A virtual position is a token -1, -2, … of its row."""
        tokens = build_row_adapters((row.adapters, len(row.tokens)) for row in rows)
        sampled = build_row_adapters((row.adapters, row.num_logits) for row in rows)
        for slot in tokens.slots.tolist():
            self.copies.wait(slot)
        virtual, first = list[tuple[int, int, int, int]](), 0
        for row in rows:
            virtual += self._virtual(row, first)
            first += len(row.tokens)
        self.step = self._context(tokens, sampled, virtual, paged)

    def end_step(self) -> None:
        """Clear what a step computed with: nothing acts until the next one begins."""
        self.step = self._context(NO_ADAPTERS, NO_ADAPTERS, [], None)

    def _context(
        self, tokens: RowAdapters, sampled: RowAdapters, virtual: list[tuple[int, int, int, int]],
        paged: PagedBatch | None,
    ) -> StepContext:  # fmt: skip
        acts = self._acts_of(tokens.slots.tolist())
        prepared = self._ops.prepare(tokens, sampled, acts, self.table)
        return StepContext(tokens, sampled, acts, *prepared, virtual, paged)

    def acts_in(self, rows: list[Row]) -> bool:
        """Whether any adapter of these rows changes what the base computes of their tokens."""
        if any(row.start < row.num_virtual for row in rows):
            return True
        return bool(self._acts_of(slot for row in rows for slot, _ in row.adapters).array.any())

    def _acts_of(self, used_slots: Iterable[int]) -> Acts:
        """Look up what acts where: steps come in runs that use the same slots."""
        slots = tuple(sorted(set(used_slots)))
        if slots not in self._acts:
            if len(self._acts) >= MAX_ACTS:
                self._acts.clear()
            self._acts[slots] = self._find_acts(list(slots))
        return self._acts[slots]

    def _find_acts(self, slots: list[int]) -> Acts:
        sizes: NDArray[np.int64] = self.table[:, :, slots, SIZE]
        acts = np.logical_or.reduceat((sizes != 0).any(-1)[:, self._members], self._firsts, 1)
        of_group = [tuple(mine) for mine in acts.T.tolist()]
        return Acts(np.ascontiguousarray(acts.T), of_group, int(sizes[PROJECTION].max(initial=1)))

    def _virtual(self, row: Row, first: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield the parts of its adapters' embeddings that a row's tokens are."""
        start, end, before = row.start, row.start + len(row.tokens), 0
        for slot, _ in row.adapters if start < row.num_virtual else ():
            after = before + self.slots[slot].num_virtual
            low, high = max(start, before), min(end, after)
            if low < high:
                yield slot, low - before, high - low, first + low - start
            before = after

    def enter(self, group: SiteGroup, x: Tensor, is_head: bool = False) -> Tensor:
        """Return the input x [..., in] of a group of one site, scaled if rows' adapters do so."""
        step = self.step
        if not step.acts.of_group[group.number][SCALE_IN]:
            return x
        x = x.clone(memory_format=torch.contiguous_format)
        prepared = step.of_sampled if is_head else step.of_tokens
        self._ops.scale_input(int(group.sites[0]), x.view(-1, x.shape[-1]), prepared)
        return x

    def apply(self, group: SiteGroup, x: Tensor, y: Tensor, is_head: bool = False) -> None:
        """Change y [..., out] in place by what the rows' adapters do at sites whose input is x [..., in]."""
        step = self.step
        if step.acts.of_group[group.number] == IDLE:
            return
        y = y.view(-1, y.shape[-1])
        x = x.reshape(-1, x.shape[-1]).contiguous()
        stream = step.stream.reshape(-1, step.stream.shape[-1]).contiguous() if step.stream.numel() else y
        self._ops.apply(group, x, stream, y, step.of_sampled if is_head else step.of_tokens)

    def embed(self, token_ids: Tensor, y: Tensor) -> None:
        """Change the embeddings y [1, T, size] of token_ids [1, T]: changed rows, and those of virtual positions."""
        step, group = self.step, self._embedding
        if step.acts.of_group[group.number][ROWS]:
            self._ops.embed_rows(int(group.sites[0]), token_ids[0], y[0], step.of_tokens)
        for slot, start, count, first in step.virtual:
            prefix = self.prefix(slot)
            if isinstance(prefix, PrefixEmbeds):
                y[0, first : first + count] = prefix.embeds[start : start + count]
