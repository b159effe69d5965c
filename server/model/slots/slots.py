"""Slots, and what the patches in them do to a step's rows.

A slot is a packed patch on the device. Rows of the batch name their hats as (slot, weight); the base's modules hand
their inputs and outputs to the bank, and at a site where no worn patch acts that costs one look into a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.primitives import Bias, Delta, LowRank, Patch, Prefix, PrefixEmbeds, Primitive, Rows, Scale
from server.core import Row
from server.model.backends import cpu
from server.model.backends.base import KINDS, PROJECTION, ROWS, SCALE_IN
from server.model.backends.cpu import adapters
from server.model.backends.torch_ops.adapters import Stacked
from server.model.backends.torch_ops.copies import Copies
from server.model.precision import StorageDtypes
from server.model.row_adapters import NO_ADAPTERS, RowAdapters, SiteGroup, build_row_adapters
from server.model.slots.layout import SIZE, PackedPatch, Sites, pack, prefix_of, view
from server.model.slots.reference import embed_rows, scale_reference, update_reference

MIN_SLOTS = 16
MAX_ACTS = 256  # sets of slots whose acts are kept
IDLE = (False,) * len(KINDS)
ITEM_TYPES = {torch.float32: np.empty(0, np.float32), torch.float16: np.empty(0, np.uint16)}  # of kernels, see `vector`


@dataclass(frozen=True)
class Acts:
    """What some slots do at all groups: whether each kind acts there, as an array and as tuples."""

    array: NDArray[np.bool_]  # [groups, kinds]
    of_group: list[tuple[bool, ...]]
    max_rank: int


class AdapterSlots:
    """The slots of one base on one device. `on_change` is told which sites a slot acts at when it comes and goes."""

    def __init__(self, spec: BaseSpec, device: str, dtypes: StorageDtypes) -> None:
        self.spec, self.sites = spec, Sites(spec)
        self.device, self.dtypes = device, dtypes
        self.slots: dict[int, PackedPatch] = {}
        self.table = np.zeros((len(KINDS), len(self.sites), MIN_SLOTS, 3), np.int64)
        self.addresses = np.zeros(MIN_SLOTS, np.int64)
        self.on_change: Callable[[PackedPatch, int], None] = lambda _packed, _change: None
        self.tokens = self.sampled = NO_ADAPTERS
        self.virtual: list[tuple[int, int, int, int]] = []  # slot, first of its embeddings, how many, first token
        self.stream = torch.empty(0)  # of the layer that is being computed, where a branch reads it
        self.inside: set[int] = set()  # sites that layers in one call compute themselves, see `fused`
        self._groups: dict[tuple[str, ...], SiteGroup] = {}
        self._members = self._firsts = np.zeros(0, np.int64)  # sites of all groups, and where each group begins there
        self._acts: dict[tuple[int, ...], Acts] = {}  # by the slots that act
        self._has_kernels = cpu.supports(device, dtypes.others)
        self._item_type = ITEM_TYPES.get(dtypes.matrices)
        self.copies = Copies(device)
        by_segment = partial(scale_reference, self), partial(update_reference, self)
        self._stacked = Stacked(self.primitive, dtypes.others, self.copies, *by_segment)
        self.group(spec.embedding)

    def group(self, *names: str) -> SiteGroup:
        """The group of some sites, for `enter` and `apply`."""
        if names not in self._groups:
            sites = np.array([self.sites.index[name] for name in names], np.int64)
            columns = np.cumsum([0, *(self.sites.widths[site][1] for site in sites)])
            self._groups[names] = SiteGroup(len(self._groups), sites, columns)
            self._members = np.concatenate([group.sites for group in self._groups.values()])
            self._firsts = np.cumsum([0, *(len(group.sites) for group in self._groups.values())])[:-1]
            self._invalidate()
            self._mark()
        return self._groups[names]

    def pack(self, patch: Patch) -> PackedPatch:
        """Lay a patch out for a slot; any thread. Raises `ValueError` where a value does not fit."""
        return self.pin(pack(patch, self.sites, self.dtypes))

    def pin(self, packed: PackedPatch) -> PackedPatch:
        """The same in memory that the device reads by itself; any thread."""
        row_ids = {site: self.copies.pin(ids) for site, ids in packed.row_ids.items()}
        return replace(packed, buffer=self.copies.pin(packed.buffer), row_ids=row_ids)

    def insert(self, packed: PackedPatch) -> int:
        """Copy into a free slot and return its number; between steps only."""
        slot = next(number for number in range(len(self.slots) + 1) if number not in self.slots)
        if slot >= len(self.addresses):
            self.table = np.concatenate([self.table, np.zeros_like(self.table)], 2)
            self.addresses = np.concatenate([self.addresses, np.zeros_like(self.addresses)])
        buffer, *ids = self.copies.start(slot, [packed.buffer, *packed.row_ids.values()])
        self.slots[slot] = replace(packed, buffer=buffer, row_ids=dict(zip(packed.row_ids, ids, strict=True)))
        kind, site, *entry = packed.entries.T
        self.table[kind, site, slot] = np.stack(entry, 1)
        self.addresses[slot] = buffer.data_ptr() if self._has_kernels else 0
        self.on_change(packed, 1)
        self._invalidate()
        return slot

    def drop(self, slot: int) -> None:
        """Free a slot; between steps only."""
        self.on_change(self.slots.pop(slot), -1)
        self.copies.release(slot)
        self.table[:, :, slot] = 0
        self.addresses[slot] = 0
        self._invalidate()

    def primitive(self, kind: int, site: int, slot: int) -> Primitive | None:
        """What a slot's patch does at a site."""
        entry = self.table[kind, site, slot]
        return view(self.slots[slot], self.sites, kind, site, entry) if entry[SIZE] else None

    def warm_up(self) -> None:
        """Run every kernel once: its first call compiles it, and that must not be a user's."""
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
            self.set_batch([Row([0], 0, [0], adapters=((slot, 1.0),))])
            x = self.enter(group, of_x.to(self.device))
            self.apply(group, x, of_y.to(self.device, copy=True))
        finally:
            self.set_batch([])
            self.drop(slot)

    def prefix(self, slot: int) -> Prefix | None:
        """The virtual positions of a slot's patch."""
        self.copies.wait(slot)
        return prefix_of(self.slots[slot], self.spec.embedding_size, self.spec.kv)

    def set_batch(self, rows: list[Row]) -> None:
        """Say what the next forward's rows wear; [] undresses. A virtual position is a token -1, -2, … of its row."""
        self.tokens = build_row_adapters((row.adapters, len(row.tokens)) for row in rows)
        self.sampled = build_row_adapters((row.adapters, 1) for row in rows if row.sampling)
        self._mark()
        for slot in self.tokens.slots.tolist():
            self.copies.wait(slot)
        if rows and not self._has_kernels:
            self._stacked.set_batch(self.tokens, self.sampled)
        self.virtual, first = [], 0
        for row in rows:
            self.virtual += self._virtual(row, first)
            first += len(row.tokens)

    def acts_in(self, rows: list[Row]) -> bool:
        """Whether anything that these rows wear changes what the base computes of their tokens."""
        if any(row.start < row.num_virtual for row in rows):
            return True
        return bool(self._acts_of(slot for row in rows for slot, _ in row.adapters).array.any())

    def _invalidate(self) -> None:
        """A slot or a group came or went: whoever dresses next sees anew what acts where."""
        self._acts.clear()
        self._stacked.invalidate()

    def _mark(self) -> None:
        """See what acts where in this step. Steps come in runs that wear the same: those are looked up."""
        self.now = self._acts_of(self.tokens.slots.tolist())

    @property
    def acts(self) -> list[tuple[bool, ...]]:
        """By the number of a group: whether each kind acts there in this step."""
        return self.now.of_group

    def _acts_of(self, used_slots: Iterable[int]) -> Acts:
        slots = tuple(sorted(set(used_slots)))
        if slots not in self._acts:
            if len(self._acts) >= MAX_ACTS:
                self._acts.clear()
            self._acts[slots] = self._find_acts(list(slots))
        return self._acts[slots]

    def _find_acts(self, slots: list[int]) -> Acts:
        sizes = self.table[:, :, slots, SIZE]
        acts = np.logical_or.reduceat((sizes != 0).any(-1)[:, self._members], self._firsts, 1)
        return Acts(
            np.ascontiguousarray(acts.T),
            [tuple(mine) for mine in acts.T.tolist()],
            int(sizes[PROJECTION].max(initial=1)),
        )

    def _virtual(self, row: Row, first: int) -> Iterable[tuple[int, int, int, int]]:
        """The parts of its hats' embeddings that a row's tokens are."""
        start, end, before = row.start, row.start + len(row.tokens), 0
        for slot, _ in row.adapters if start < row.num_virtual else ():
            after = before + self.slots[slot].num_virtual
            low, high = max(start, before), min(end, after)
            if low < high:
                yield slot, low - before, high - low, first + low - start
            before = after

    def enter(self, group: SiteGroup, x: Tensor, is_head: bool = False) -> Tensor:
        """The input x [..., in] of a group of one site, scaled where rows' hats do so."""
        if not self.acts[group.number][SCALE_IN]:
            return x
        x = x.clone(memory_format=torch.contiguous_format)
        row_adapters = self.sampled if is_head else self.tokens
        rows = x.view(-1, x.shape[-1])
        if self._has_kernels:
            adapters.enter(rows.numpy(), int(group.sites[0]), self.arrays(row_adapters))
        else:
            self._stacked.scale(SCALE_IN, int(group.sites[0]), rows, row_adapters, is_head)
        return x

    def apply(self, group: SiteGroup, x: Tensor, y: Tensor, is_head: bool = False) -> None:
        """Change y [..., out] in place by what the rows' hats do at sites whose input is x [..., in]."""
        acts = self.acts[group.number]
        if acts == IDLE:
            return
        y, row_adapters = y.view(-1, y.shape[-1]), self.sampled if is_head else self.tokens
        if len(y) != row_adapters.num_rows:
            row_adapters = row_adapters.repeated(len(y) // row_adapters.num_rows)
        x = x.reshape(-1, x.shape[-1]).contiguous()
        if not self._has_kernels:
            self._stacked.apply(group, x, y, row_adapters, is_head)
            return
        stream = self.stream.reshape(-1, self.stream.shape[-1]).contiguous() if self.stream.numel() else y
        adapters.apply(x.numpy(), stream.numpy(), y.numpy(), tuple(group), self.arrays(row_adapters))
        if acts[ROWS]:
            site = int(group.sites[0])
            for span, slot, weight in self._with_rows(site, row_adapters):
                self._run_rows(adapters.head_rows, x[span], y[span], site, slot, weight)

    def embed(self, token_ids: Tensor, y: Tensor) -> None:
        """Change the embeddings y [1, T, size] of token_ids [1, T]: changed rows, and those of virtual positions."""
        site = self.sites.index[self.spec.embedding]
        if self.acts[self.group(self.spec.embedding).number][ROWS]:
            for span, slot, weight in self._with_rows(site, self.tokens):
                if self._has_kernels:
                    self._run_rows(adapters.embed_rows, token_ids[0, span], y[0, span], site, slot, weight)
                elif isinstance(rows := self.primitive(ROWS, site, slot), Rows):
                    embed_rows(rows, token_ids[0, span], y[0, span], weight)
        for slot, start, count, first in self.virtual:
            prefix = self.prefix(slot)
            if isinstance(prefix, PrefixEmbeds):
                y[0, first : first + count] = prefix.embeds[start : start + count]

    def _with_rows(self, site: int, row_adapters: RowAdapters) -> Iterator[tuple[slice, int, float]]:
        """The rows of a step whose hats change rows of the embedding or the head: (span, slot, weight) of each hat."""
        for span, slot_weights in row_adapters.segments():
            yield from ((span, slot, weight) for slot, weight in slot_weights if site in self.slots[slot].row_ids)

    def _run_rows(self, kernel: Any, x: Tensor, y: Tensor, site: int, slot: int, weight: float) -> None:
        address = self.addresses[slot] + self.table[ROWS, site, slot, adapters.OFFSET]
        ids = self.slots[slot].row_ids[site].numpy()
        kernel(x.numpy(), y.numpy(), ids, address, np.float32(weight), self._item_type)

    def arrays(self, row_adapters: RowAdapters) -> tuple[Any, ...]:
        """What rows wear, and where it lies, as the kernels take it."""
        now = self.now
        return (
            row_adapters.tiles,
            row_adapters.slots,
            row_adapters.weights,
            self.addresses,
            self.table,
            now.array,
            now.max_rank,
            self._item_type,
        )
