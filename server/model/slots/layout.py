"""A patch in the layout of a slot: one flat buffer at true sizes, and a table of offsets.

The host copy has the layout of the device's, so that filling a slot is one copy, and on a CPU none. Matrices
may be kept in fewer bits than what is computed with; vectors and prefixes never are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store.base.spec import BaseSpec, KVShape
from adapters_store.format.safetensors_file import is_finite
from adapters_store.primitives import (
    Bias,
    Bottleneck,
    Delta,
    LowRank,
    Patch,
    Prefix,
    PrefixEmbeds,
    PrefixKV,
    Primitive,
    Rows,
    Scale,
)
from server.model.backends.codes import (
    ACTIVATION_CODES,
    ACTIVATION_MASK,
    BIAS,
    DELTA,
    IS_BIASED,
    NORM_AFTER,
    NORM_BEFORE,
    OF_OUTPUT,
    OF_STREAM,
    PROJECTION,
    ROWS,
    SCALE_IN,
    SCALE_OUT,
    SOURCE_FLAGS,
)
from server.model.precision import StorageDtypes


class Sites:
    """Sites of a base by number, with the widths (in, out) of what goes in and comes out."""

    def __init__(self, spec: BaseSpec) -> None:
        widths = {site: (linear.in_features, linear.out_features) for site, linear in spec.linears.items()}
        widths |= {site: (norm.size, norm.size) for site, norm in spec.norms.items()}
        for layer in spec.layers:
            for site in (layer.layer, layer.attention, layer.mlp):
                if site is not None:
                    widths.setdefault(site, (spec.hidden_size, spec.hidden_size))
        widths.setdefault(spec.embedding, (spec.embedding_size, spec.embedding_size))
        self.names, self.widths = list(widths), list(widths.values())
        self.index = {site: number for number, site in enumerate(widths)}
        self.head, self.kv = spec.head, spec.kv
        self.is_linear = [site in spec.linears for site in widths]
        self.stream_of = {layer.mlp: layer.stream for layer in spec.layers if layer.mlp and layer.stream}

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class PackedPatch:
    """A patch in the slot's layout.

    `entries` has a row for each primitive: kind, site, offset in bytes, size, flags. At a projection's offset lie A
    [r, in] and B transposed [r, out]; with flags then d [r], u [out], and (gamma, beta) of each norm. Elsewhere lies
    the primitive's one tensor; of a prefix its embeddings, or layer by layer keys and values.
    """

    digest: str
    buffer: Tensor  # uint8
    dtypes: StorageDtypes
    entries: NDArray[np.int64]  # [primitives, 5]
    row_ids: dict[int, Tensor] = field(default_factory=dict)  # site -> ids of `Rows`, int32
    prefix: tuple[type[Prefix], int, int] | None = None  # kind, offset, number of positions

    @property
    def num_bytes(self) -> int:
        """Bytes charged to the host and slot budgets; the small entry table is not counted."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.buffer, *self.row_ids.values()))

    @property
    def num_virtual(self) -> int:
        """Number of virtual positions it puts before a prompt."""
        return 0 if self.prefix is None else self.prefix[2]


def pack(patch: Patch, sites: Sites, dtypes: StorageDtypes) -> PackedPatch:
    """Lay a patch out, in host memory. Raises `ValueError` for two of a kind at a site and values that do not fit."""
    entries: dict[tuple[int, int], tuple[int, ...]] = {}
    layout, row_ids, prefix = _Layout(), dict[int, Tensor](), None
    for primitive in patch.primitives:
        if isinstance(primitive, PrefixEmbeds | PrefixKV):
            prefix = (type(primitive), layout.end, primitive.num_tokens)
        else:
            kind, site = kind_of(primitive), sites.index[primitive.site]
            size, flags = STORED[kind].size(primitive), STORED[kind].flags(primitive)
            if (kind, site) in entries:
                raise ValueError(f"two primitives of one kind at {primitive.site}")
            entries[kind, site] = kind, site, layout.end, size, flags
            if isinstance(primitive, Rows):
                row_ids[site] = primitive.ids.to(torch.int32)
        matrices = list(primitive.matrices())
        is_odd = sum(matrix.numel() for matrix in matrices) % 2
        layout.add(matrices + [torch.zeros(1)] * is_odd, dtypes.matrices)  # see `primitives.even`
        layout.add(primitive.vectors(), dtypes.others)
    table = np.array(list(entries.values()), np.int64).reshape(-1, 5)
    return PackedPatch(patch.digest, layout.write(), dtypes, table, row_ids, prefix)


class _Layout:
    """Tensors one behind another, each in a type; `end` is in bytes."""

    def __init__(self) -> None:
        self.end = 0
        self._parts: list[tuple[torch.dtype, Tensor]] = []

    def add(self, tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
        """Append tensors, in a type."""
        for tensor in tensors:
            self._parts.append((dtype, tensor))
            self.end += tensor.numel() * dtype.itemsize

    def write(self) -> Tensor:
        """Return the buffer. Raises `ValueError` if a value does not fit its type."""
        buffer, end = torch.empty(self.end, dtype=torch.uint8), 0
        for dtype, run in groupby(self._parts, itemgetter(0)):
            tensors = [tensor for _, tensor in run]
            begin, end = end, end + sum(tensor.numel() for tensor in tensors) * dtype.itemsize
            stored = buffer[begin:end].view(dtype)
            for tensor, part in zip(tensors, stored.split([tensor.numel() for tensor in tensors]), strict=True):
                part.view(tensor.shape).copy_(tensor)
            if not is_finite(stored):
                largest = max(tensor.abs().max().item() for tensor in tensors if tensor.numel())
                raise ValueError(f"a value of {largest:g} does not fit this server's 16 bits: use --precision fp32")
        return buffer


class _Reader:
    """Reads a buffer, one part after another, in the type that is computed with."""

    def __init__(self, packed: PackedPatch, offset: int, site: int = -1) -> None:
        self.packed, self.offset, self.site = packed, offset, site

    def row_ids(self) -> Tensor:
        """Return the ids of the rows that are changed at the site."""
        return self.packed.row_ids[self.site]

    def matrices(self, *shapes: tuple[int, int]) -> list[Tensor]:
        """Read the matrices of one primitive."""
        found = [self._take(self.packed.dtypes.matrices, shape) for shape in shapes]
        if sum(map(math.prod, shapes)) % 2:
            self.offset += self.packed.dtypes.matrices.itemsize
        return found

    def other(self, *shape: int) -> Tensor:
        """Read a tensor that is no matrix."""
        return self._take(self.packed.dtypes.others, shape)

    def _take(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        start, self.offset = self.offset, self.offset + math.prod(shape) * dtype.itemsize
        return self.packed.buffer[start : self.offset].view(dtype).view(shape).to(self.packed.dtypes.others)


@dataclass(frozen=True)
class StoredKind:
    """Storage of primitives of one kind: the entry's size and flags, and how a primitive is read back.

    `read` takes the site's name, its widths (in, out), size, flags and a reader at the entry's offset.
    """

    size: Callable[[Any], int]
    read: Callable[[str, tuple[int, int], int, int, _Reader], Primitive]
    flags: Callable[[Any], int] = lambda _primitive: 0


def kind_of(primitive: Primitive) -> int:
    """Return the kind of a primitive that acts at a site, one of `codes.KINDS`."""
    if isinstance(primitive, Scale):
        return SCALE_IN if primitive.on == "input" else SCALE_OUT
    return KIND_OF_TYPE[type(primitive)]


def _flags(projection: LowRank | Bottleneck) -> int:
    if isinstance(projection, LowRank):
        return 0
    norms = NORM_BEFORE * bool(projection.norm_before) | NORM_AFTER * bool(projection.norm_after)
    return IS_BIASED | ACTIVATION_CODES[projection.activation] | norms | SOURCE_FLAGS[projection.of]


def _read_projection(name: str, widths: tuple[int, int], size: int, flags: int, read: _Reader) -> LowRank | Bottleneck:
    a, b = read.matrices((size, widths[0]), (size, widths[1]))
    if not flags:
        return LowRank(name, a, b.T)
    biases = read.other(size), read.other(widths[1])
    norm_before = (read.other(widths[1]), read.other(widths[1])) if flags & NORM_BEFORE else None
    norm_after = (read.other(widths[1]), read.other(widths[1])) if flags & NORM_AFTER else None
    activation = NAME_OF_ACTIVATION[flags & ACTIVATION_MASK]
    of = "output" if flags & OF_OUTPUT else "stream" if flags & OF_STREAM else "input"
    return Bottleneck(name, a, b.T, activation, of, *biases, norm_before, norm_after)  # type: ignore[arg-type]


NAME_OF_ACTIVATION = {code: name for name, code in ACTIVATION_CODES.items()}
KIND_OF_TYPE = {LowRank: PROJECTION, Bottleneck: PROJECTION, Bias: BIAS, Delta: DELTA, Rows: ROWS}
STORED: dict[int, StoredKind] = {
    SCALE_IN: StoredKind(lambda p: len(p.v), lambda name, _w, size, _f, read: Scale(name, read.other(size), "input")),
    SCALE_OUT: StoredKind(lambda p: len(p.v), lambda name, _w, size, _f, read: Scale(name, read.other(size))),
    DELTA: StoredKind(
        lambda p: p.dw.numel(), lambda name, widths, _s, _f, read: Delta(name, *read.matrices((widths[1], widths[0])))
    ),
    ROWS: StoredKind(
        lambda p: len(p.ids),
        lambda name, widths, size, _f, read: Rows(name, read.row_ids(), *read.matrices((size, widths[0]))),
    ),
    PROJECTION: StoredKind(lambda p: len(p.matrices()[0]), _read_projection, _flags),
    BIAS: StoredKind(lambda p: len(p.b), lambda name, _w, size, _f, read: Bias(name, read.other(size))),
}


def view(packed: PackedPatch, sites: Sites, kind: int, site: int, entry: NDArray[np.int64]) -> Primitive:
    """Return a primitive as a patch's buffer has it; `entry` is its offset, size and flags."""
    offset, size, flags = entry.tolist()
    return STORED[kind].read(sites.names[site], sites.widths[site], size, flags, _Reader(packed, offset, site))


def prefix_of(packed: PackedPatch, hidden_size: int, kv: list[KVShape]) -> Prefix | None:
    """Return a patch's prefix, as its buffer has it, or None."""
    if packed.prefix is None:
        return None
    kind, offset, num_tokens = packed.prefix
    read = _Reader(packed, offset)
    if kind is PrefixEmbeds:
        return PrefixEmbeds(read.other(num_tokens, hidden_size))
    layers = []
    for shape in kv:
        key = read.other(num_tokens, shape.num_kv_heads, shape.key_dim)
        layers.append((key, read.other(num_tokens, shape.num_kv_heads, shape.value_dim)))
    keys, values = zip(*layers, strict=True)
    return PrefixKV(keys, values)
