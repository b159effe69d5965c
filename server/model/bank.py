"""Slots, and what the patches in them do to a step's rows.

A slot is a packed patch on the device. Rows of the batch name their hats as (slot, weight); the base's modules hand
their inputs and outputs to the bank, and at a site where no worn patch acts that costs one look into a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store.patch import Bias, Bottleneck, Delta, LowRank, Patch, Prefix, PrefixEmbeds, Primitive, Rows, Scale
from adapters_store.spec import BaseSpec
from server.model import hat_kernels as kernels
from server.model.batch import Row
from server.model.packed import (
    BIAS,
    BRANCH,
    DELTA,
    KINDS,
    ROWS,
    SCALE_IN,
    SCALE_OUT,
    SIZE,
    Packed,
    Sites,
    pack,
    prefix_of,
    view,
)
from server.model.worn import NOTHING, Worn, runs, wear

MIN_SLOTS = 16


NO_ACTS = (False,) * len(KINDS)


class SlotBank:
    """The slots of one base on one device. `on_change` is told which sites a slot acts at when it comes and goes."""

    def __init__(self, spec: BaseSpec, device: str, dtype: torch.dtype) -> None:
        self.spec, self.sites = spec, Sites(spec)
        self.device, self.dtype = device, dtype
        self.slots: dict[int, Packed] = {}
        self.table = np.zeros((len(KINDS), len(self.sites), MIN_SLOTS, 3), np.int64)
        self.addresses = np.zeros(MIN_SLOTS, np.int64)
        self.on_change: Callable[[Packed, int], None] = lambda _packed, _change: None
        self.tokens = self.sampled = NOTHING
        self.acts: list[tuple[bool, ...]] = [NO_ACTS] * len(self.sites)  # by site: whether each kind acts in this step
        self.virtual: list[tuple[int, int, int, int]] = []  # slot, first of its embeddings, how many, first token
        self.stream = torch.empty(0)  # of the layer that is being computed, where a branch reads it
        self.max_rank = 1

    def site_index(self, site: str) -> int:
        """The number of a site, for `apply`."""
        return self.sites.index[site]

    def pack(self, patch: Patch) -> Packed:
        """Lay a patch out for a slot; any thread."""
        packed = pack(patch, self.sites, self.dtype)
        return packed if self.device == "cpu" else replace(packed, buffer=packed.buffer.pin_memory())

    def put(self, packed: Packed) -> int:
        """Copy into a free slot and return its number; between steps only."""
        slot = next(number for number in range(len(self.slots) + 1) if number not in self.slots)
        if slot >= len(self.addresses):
            self.table = np.concatenate([self.table, np.zeros_like(self.table)], 2)
            self.addresses = np.concatenate([self.addresses, np.zeros_like(self.addresses)])
        buffer = torch.empty_like(packed.buffer, device=self.device)
        buffer.copy_(packed.buffer, non_blocking=True)
        row_ids = {site: ids.to(self.device) for site, ids in packed.row_ids.items()}
        self.slots[slot] = replace(packed, buffer=buffer, row_ids=row_ids)
        kind, site, *entry = packed.entries.T
        self.table[kind, site, slot] = np.stack(entry, 1)
        self.addresses[slot] = buffer.data_ptr()
        self.on_change(packed, 1)
        return slot

    def drop(self, slot: int) -> None:
        """Free a slot; between steps only."""
        self.on_change(self.slots.pop(slot), -1)
        self.table[:, :, slot] = 0
        self.addresses[slot] = 0

    def primitive(self, kind: int, site: int, slot: int) -> Primitive | None:
        """What a slot's patch does at a site, as views of its buffer."""
        entry = self.table[kind, site, slot]
        return view(self.slots[slot], self.sites, kind, site, entry) if entry[SIZE] else None

    def warm_up(self) -> None:
        """Run every kernel once: its first call compiles it, and that must not be a user's."""
        site, linear = next(iter(self.spec.linears.items()))
        zeros = partial(torch.zeros, dtype=self.dtype)
        of_x, of_y = zeros(1, linear.in_features), zeros(1, linear.out_features)
        primitives = (
            Scale(site, zeros(linear.in_features), "input"),
            Scale(site, of_y[0]),
            Delta(site, zeros(linear.out_features, linear.in_features)),
            LowRank(site, of_x, of_y.T),
            Bias(site, of_y[0]),
        )
        slot = self.put(self.pack(Patch("warm-up", "", primitives)))
        try:
            self.dress([Row([0], 0, [0], hats=((slot, 1.0),))])
            x = self.enter(self.site_index(site), of_x.to(self.device))
            self.apply(self.site_index(site), x, of_y.to(self.device, copy=True))
        finally:
            self.dress([])
            self.drop(slot)

    def prefix(self, slot: int) -> Prefix | None:
        """The virtual positions of a slot's patch."""
        return prefix_of(self.slots[slot], self.spec.embedding_size, self.spec.kv)

    def dress(self, rows: list[Row]) -> None:
        """Say what the next forward's rows wear; [] undresses. A virtual position is a token -1, -2, … of its row."""
        self.tokens = wear([row.hats for row in rows for _ in row.tokens])
        self.sampled = wear([row.hats for row in rows if row.sampling])
        slots = np.unique(self.tokens.slots)
        sizes = self.table[:, :, slots, SIZE]
        self.max_rank = int(sizes[BRANCH].max(initial=1))
        self.acts = list(map(tuple, (sizes != 0).any(-1).T.tolist()))
        self.virtual, first = [], 0
        for row in rows:
            self.virtual += self._virtual(row, first)
            first += len(row.tokens)

    def _virtual(self, row: Row, first: int) -> Iterable[tuple[int, int, int, int]]:
        """The parts of its hats' embeddings that a row's tokens are."""
        start, end, before = row.start, row.start + len(row.tokens), 0
        for slot, _ in row.hats if start < row.num_virtual else ():
            after = before + self.slots[slot].num_virtual
            low, high = max(start, before), min(end, after)
            if low < high:
                yield slot, low - before, high - low, first + low - start
            before = after

    def enter(self, site: int, x: Tensor, is_head: bool = False) -> Tensor:
        """A site's input x [..., in], scaled where rows' hats do so."""
        if not self.acts[site][SCALE_IN]:
            return x
        x = x.clone(memory_format=torch.contiguous_format)
        self._scale(SCALE_IN, site, x.view(-1, x.shape[-1]), self.sampled if is_head else self.tokens)
        return x

    def apply(self, site: int, x: Tensor, y: Tensor, is_head: bool = False) -> None:
        """Change y [..., out] in place by what the rows' hats do at a site whose input is x [..., in]."""
        acts = self.acts[site]
        if True not in acts:
            return
        y, worn = y.view(-1, y.shape[-1]), self.sampled if is_head else self.tokens
        if len(y) != len(worn.row_hats) - 1:
            worn = worn.repeated(len(y) // (len(worn.row_hats) - 1))
        x = x.reshape(-1, x.shape[-1]).contiguous()
        if not self._has_kernels:
            apply_reference(self, site, x, y, worn)
            return
        if acts[SCALE_OUT]:
            self._scale(SCALE_OUT, site, y, worn)
        if acts[DELTA]:
            self._run(kernels.deltas, worn, x, y, self.table[DELTA, site])
        if acts[ROWS]:
            self._head_rows(site, x, y, worn)
        if acts[BRANCH] or acts[BIAS]:
            self._branches(site, x, y, worn)

    def embed(self, token_ids: Tensor, y: Tensor) -> None:
        """Change the embeddings y [1, T, size] of token_ids [1, T]: changed rows, and those of virtual positions."""
        site = self.site_index(self.spec.embedding)
        if self.acts[site][ROWS]:
            for first, last, hats in runs(self.tokens):
                for slot, weight in hats:
                    rows = self.primitive(ROWS, site, slot)
                    if isinstance(rows, Rows):
                        _embed_rows(rows, token_ids[0, first:last], y[0, first:last], weight)
        for slot, start, count, first in self.virtual:
            prefix = self.prefix(slot)
            if isinstance(prefix, PrefixEmbeds):
                y[0, first : first + count] = prefix.embeds[start : start + count]

    @property
    def _has_kernels(self) -> bool:
        return self.device == "cpu" and self.dtype == torch.float32

    def _scale(self, kind: int, site: int, y: Tensor, worn: Worn) -> None:
        if self._has_kernels:
            table = self.table[kind, site]
            kernels.scale(y.numpy(), worn.row_hats, worn.slots, worn.weights, self.addresses, table)
        else:
            scale_reference(self, kind, site, y, worn)

    def _run(self, kernel: Callable[..., None], worn: Worn, x: Tensor, y: Tensor, table: NDArray[np.int64]) -> None:
        kernel(x.numpy(), y.numpy(), worn.row_hats, worn.slots, worn.weights, self.addresses, table)

    def _head_rows(self, site: int, x: Tensor, y: Tensor, worn: Worn) -> None:
        """The changed rows of the head, by the kernel of deltas over as many outputs as rows."""
        for first, last, hats in runs(worn):
            for slot, weight in hats:
                ids = self.slots[slot].row_ids.get(site)
                if ids is not None:
                    change = y.new_zeros(last - first, len(ids))
                    alone = wear([((slot, weight),)] * (last - first))
                    self._run(kernels.deltas, alone, x[first:last], change, self.table[ROWS, site])
                    y[first:last, ids] += change

    def _branches(self, site: int, x: Tensor, y: Tensor, worn: Worn) -> None:
        stream = self.stream.reshape(-1, self.stream.shape[-1]).contiguous() if self.stream.numel() else y
        kernels.branches(
            x.numpy(),
            stream.numpy(),
            y.numpy(),
            worn.row_hats,
            worn.slots,
            worn.weights,
            self.addresses,
            self.table[BRANCH, site],
            self.table[BIAS, site],
            self.max_rank,
        )


def _embed_rows(rows: Rows, token_ids: Tensor, y: Tensor, weight: float) -> None:
    """y [T, size] += weight dE[j] where the token is ids[j]."""
    token_ids = token_ids.to(rows.ids.dtype)
    place = torch.searchsorted(rows.ids, token_ids).clamp(max=len(rows.ids) - 1)
    changed = rows.ids[place] == token_ids
    y[changed] += weight * rows.de[place[changed]]


def scale_reference(bank: SlotBank, kind: int, site: int, y: Tensor, worn: Worn) -> None:
    """The slow twin of `hat_kernels.scale`, in plain torch on any device."""
    for first, last, hats in runs(worn):
        for slot, weight in hats:
            primitive = bank.primitive(kind, site, slot)
            if isinstance(primitive, Scale):
                y[first:last] *= primitive.factor(weight)


def apply_reference(bank: SlotBank, site: int, x: Tensor, y: Tensor, worn: Worn) -> None:
    """The slow twin of the kernels, in plain torch on any device: the primitives' own formulas, run by run."""
    scale_reference(bank, SCALE_OUT, site, y, worn)
    stream = bank.stream.reshape(-1, bank.stream.shape[-1]) if bank.stream.numel() else y
    for first, last, hats in runs(worn):
        span, late = slice(first, last), []
        for slot, weight in hats:
            for kind in (DELTA, ROWS, BIAS, BRANCH):
                primitive = bank.primitive(kind, site, slot)
                if isinstance(primitive, Bottleneck) and primitive.of == "output":
                    late.append((primitive, weight))
                elif isinstance(primitive, Bottleneck):
                    y[span] += weight * primitive.update(stream[span] if primitive.of == "stream" else x[span])
                elif isinstance(primitive, Rows):
                    y[span, primitive.ids] += weight * (x[span] @ primitive.de.T)
                elif primitive is not None and not isinstance(primitive, Scale | PrefixEmbeds):
                    y[span] += weight * primitive.update(x[span])  # type: ignore[union-attr]
        for bottleneck, weight in late:
            y[span] += weight * bottleneck.update(y[span])
