"""Slots, and what the patches in them do to a step's rows.

A slot is one flat buffer on the device that holds all of a patch's tensors at their true ranks, and one line of the
table that says where each site's primitive lies in it. The host copy has the same layout, so that filling a slot is
one copy. Rows of the batch name their hats as (slot, weight).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store.patch import LowRank, Patch
from server.model import kernels
from server.model.batch import Row

OFFSET, RANK = 0, 1  # columns of the table
MIN_SLOTS = 16


@dataclass(frozen=True)
class Packed:
    """A patch in the slot's layout, in host memory.

    At a site of offset o and rank r the buffer holds A [r, in], then B transposed [r, out].
    """

    digest: str
    buffer: Tensor
    table: NDArray[np.int64]  # [num_sites, 2] = (offset in items, rank), rank 0 where the patch does nothing

    @property
    def num_bytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()


class Slots(Protocol):
    """What the adapter manager needs of a bank."""

    def pack(self, patch: Patch) -> Packed:
        """Lay a patch out for a slot; any thread."""
        ...

    def put(self, packed: Packed) -> int:
        """Copy into a free slot and return its number; between steps only."""
        ...

    def drop(self, slot: int) -> None:
        """Free a slot; between steps only."""
        ...


@dataclass(frozen=True)
class Worn:
    """Which hats each of some rows wears: row t wears [row_hats[t] : row_hats[t + 1]] of (slots, weights)."""

    row_hats: NDArray[np.int64]
    slots: NDArray[np.int64]
    weights: NDArray[np.float32]


def wear(hats: list[tuple[tuple[int, float], ...]]) -> Worn:
    """Lay out the (slot, weight) lists of rows."""
    flat = [hat for row in hats for hat in row]
    return Worn(
        np.cumsum([0, *map(len, hats)], dtype=np.int64),
        np.array([slot for slot, _ in flat], np.int64),
        np.array([weight for _, weight in flat], np.float32),
    )


NOTHING = wear([])


class SlotBank:
    """The slots of one base on one device."""

    def __init__(self, sites: dict[str, tuple[int, int]], device: str, dtype: torch.dtype) -> None:
        self.sites, self.shapes = {site: index for index, site in enumerate(sites)}, list(sites.values())
        self.device, self.dtype = device, dtype
        self.buffers: dict[int, Tensor] = {}
        self.table = np.zeros((len(sites), MIN_SLOTS, 2), np.int64)
        self.addresses = np.zeros(MIN_SLOTS, np.int64)
        self.tokens = self.sampled = NOTHING
        self.max_rank = 0

    def site_index(self, site: str) -> int:
        """The number of a site, for `apply`."""
        return self.sites[site]

    def pack(self, patch: Patch) -> Packed:
        """Lay a patch out for a slot; any thread."""
        table, parts, offset = np.zeros((len(self.sites), 2), np.int64), [], 0
        for primitive in patch.primitives:
            if not isinstance(primitive, LowRank):
                raise TypeError(f"{type(primitive).__name__} is not packed yet")
            table[self.sites[primitive.site]] = offset, primitive.rank
            parts += [primitive.a.flatten(), primitive.b.T.flatten()]
            offset += primitive.num_items
        buffer = torch.cat(parts).to(self.dtype)
        return Packed(patch.digest, buffer.pin_memory() if self.device != "cpu" else buffer, table)

    def put(self, packed: Packed) -> int:
        """Copy into a free slot and return its number; between steps only."""
        slot = next(number for number in range(len(self.buffers) + 1) if number not in self.buffers)
        if slot >= len(self.addresses):
            self.table = np.concatenate([self.table, np.zeros_like(self.table)], 1)
            self.addresses = np.concatenate([self.addresses, np.zeros_like(self.addresses)])
        self.buffers[slot] = torch.empty_like(packed.buffer, device=self.device)
        self.buffers[slot].copy_(packed.buffer, non_blocking=True)
        self.table[:, slot] = packed.table
        self.addresses[slot] = self.buffers[slot].data_ptr()
        return slot

    def drop(self, slot: int) -> None:
        """Free a slot; between steps only."""
        del self.buffers[slot]
        self.table[:, slot] = 0
        self.addresses[slot] = 0

    def warm_up(self) -> None:
        """Run the kernel once: its first call compiles it, and that must not be a user's."""
        site = next(iter(self.sites))
        size_in, size_out = self.shapes[self.sites[site]]
        like = torch.zeros(1, 1, dtype=self.dtype, device=self.device)
        primitive = LowRank(site, torch.zeros(1, size_in), torch.zeros(size_out, 1))
        slot = self.put(self.pack(Patch("warm-up", "lora", (primitive,))))
        try:
            self.dress([Row([0], 0, [0], hats=((slot, 1.0),))])
            self.apply(self.sites[site], like.new_zeros(1, 1, size_in), like.new_zeros(1, 1, size_out), False)
        finally:
            self.dress([])
            self.drop(slot)

    def dress(self, rows: list[Row]) -> None:
        """Say what the next forward's rows wear; [] undresses."""
        self.tokens = wear([row.hats for row in rows for _ in row.tokens])
        self.sampled = wear([row.hats for row in rows if row.sampling])
        self.max_rank = int(self.table[:, np.unique(self.tokens.slots), RANK].max(initial=0))

    def apply(self, site: int, x: Tensor, y: Tensor, is_head: bool) -> None:
        """Add to y [..., out] in place what the rows' hats do at a site whose input is x [..., in]."""
        worn = self.sampled if is_head else self.tokens
        if not len(worn.slots):
            return
        x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if self.device == "cpu" and self.dtype == torch.float32:
            kernels.low_rank(
                x.numpy(),
                y.numpy(),
                worn.row_hats,
                worn.slots,
                worn.weights,
                self.addresses,
                self.table[site],
                self.max_rank,
            )
        else:
            apply_reference(self, site, x, y, worn)

    def low_rank(self, site: int, slot: int) -> LowRank | None:
        """The primitive that a slot has at a site, as views of the slot's buffer."""
        offset, rank = self.table[site, slot].tolist()
        if not rank:
            return None
        size_in, size_out = self.shapes[site]
        flat = self.buffers[slot][offset : offset + rank * (size_in + size_out)]
        a, b = flat.split([rank * size_in, rank * size_out])
        return LowRank(str(site), a.view(rank, size_in), b.view(rank, size_out).T)


def apply_reference(bank: SlotBank, site: int, x: Tensor, y: Tensor, worn: Worn) -> None:
    """The slow twin of `kernels.low_rank`, in plain torch on any device: a product per row and hat run."""
    for first, last, hats in runs(worn):
        for slot, weight in hats:
            primitive = bank.low_rank(site, slot)
            if primitive is not None:
                y[first:last] += weight * (x[first:last] @ primitive.a.T) @ primitive.b.T


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
