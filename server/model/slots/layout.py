"""A patch in the layout of a slot: one flat buffer at true sizes, and a table that says where what lies.

The host copy has the layout of the device's, so that filling a slot is one copy, and on a CPU none. Matrices
may be kept in fewer bits than what is computed with; vectors and prefixes never are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store.base.spec import BaseSpec, KVShape
from adapters_store.format.safetensors_file import is_finite
from adapters_store.primitives import (
    ACTIVATIONS,
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
from server.model.backends.base import BIAS, DELTA, PROJECTION, ROWS, SCALE_IN, SCALE_OUT
from server.model.backends.cpu import adapters as codes
from server.model.precision import StorageDtypes

SIZE = codes.SIZE  # the table's column that is 0 where nothing acts
CODE_OF = {name: code for code, name in enumerate(ACTIVATIONS)}
SOURCES = {"input": 0, "output": codes.OF_OUTPUT, "stream": codes.OF_STREAM}


class Sites:
    """All sites of a base by number, with the widths (in, out) of what goes in and comes out."""

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

    `entries` has a row for each primitive: kind, site, offset in bytes, size, flags. At a branch's offset lie A [r, in]
    and B transposed [r, out]; with flags then d [r], u [out], and (gamma, beta) of each norm. Elsewhere lies the
    primitive's one tensor; of a prefix its embeddings, or layer by layer keys and values.
    """

    digest: str
    buffer: Tensor  # uint8
    dtypes: StorageDtypes
    entries: NDArray[np.int64]  # [primitives, 5]
    row_ids: dict[int, Tensor] = field(default_factory=dict)  # site -> ids of `Rows`, int32
    prefix: tuple[type[Prefix], int, int] | None = None  # kind, offset, number of positions

    @property
    def num_bytes(self) -> int:
        """What it takes at either level, but for the few numbers that say where it lies."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.buffer, *self.row_ids.values()))

    @property
    def num_virtual(self) -> int:
        """How many virtual positions it puts before a prompt."""
        return 0 if self.prefix is None else self.prefix[2]


def pack(patch: Patch, sites: Sites, dtypes: StorageDtypes) -> PackedPatch:
    """Lay a patch out, in host memory. Raises `ValueError` for two of a kind at a site and values that do not fit."""
    entries: dict[tuple[int, int], tuple[int, ...]] = {}
    layout, row_ids, prefix = _Layout(), dict[int, Tensor](), None
    for primitive in patch.primitives:
        if isinstance(primitive, PrefixEmbeds | PrefixKV):
            prefix = (type(primitive), layout.end, primitive.num_tokens)
        else:
            kind, size, flags = _entry(primitive)
            site = sites.index[primitive.site]
            if (kind, site) in entries:
                raise ValueError(f"two primitives of one kind at {primitive.site}")
            entries[kind, site] = kind, site, layout.end, size, flags
            if isinstance(primitive, Rows):
                row_ids[site] = primitive.ids.to(torch.int32)
        matrices = list(_matrices(primitive))
        is_odd = sum(matrix.numel() for matrix in matrices) % 2
        layout.add(matrices + [torch.zeros(1)] * is_odd, dtypes.matrices)  # see `patch.even`
        layout.add(_vectors(primitive), dtypes.others)
    table = np.array(list(entries.values()), np.int64).reshape(-1, 5)
    return PackedPatch(patch.digest, layout.write(), dtypes, table, row_ids, prefix)


class _Layout:
    """Tensors one behind another, each in a type; `end` is in bytes."""

    def __init__(self) -> None:
        self.end = 0
        self._parts: list[tuple[torch.dtype, Tensor]] = []

    def add(self, tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
        """Some more."""
        for tensor in tensors:
            self._parts.append((dtype, tensor))
            self.end += tensor.numel() * dtype.itemsize

    def write(self) -> Tensor:
        """The buffer. Raises `ValueError` where a value does not fit its type."""
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


def _matrices(primitive: Primitive) -> Iterator[Tensor]:
    match primitive:
        case LowRank(a=a, b=b) | Bottleneck(down=a, up=b):
            yield from (a, b.T)
        case Delta(dw=part) | Rows(de=part):
            yield part


def _vectors(primitive: Primitive) -> Iterator[Tensor]:
    match primitive:
        case Bottleneck(down=down, up=up):
            yield down.new_zeros(len(down)) if primitive.down_bias is None else primitive.down_bias
            yield up.new_zeros(len(up)) if primitive.up_bias is None else primitive.up_bias
            yield from (part for norm in (primitive.norm_before, primitive.norm_after) if norm for part in norm)
        case Scale(v=part) | Bias(b=part) | PrefixEmbeds(embeds=part):
            yield part
        case PrefixKV(keys=keys, values=values):
            yield from (part for layer in zip(keys, values, strict=True) for part in layer)


def _entry(primitive: Primitive) -> tuple[int, int, int]:
    """Kind, size, flags."""
    match primitive:
        case LowRank():
            return PROJECTION, primitive.rank, 0
        case Bottleneck():
            norms = codes.NORM_BEFORE * bool(primitive.norm_before) | codes.NORM_AFTER * bool(primitive.norm_after)
            activation = CODE_OF[primitive.activation]
            return PROJECTION, len(primitive.down), codes.IS_BIASED | activation | norms | SOURCES[primitive.of]
        case Scale(v=v, on=on):
            return SCALE_IN if on == "input" else SCALE_OUT, len(v), 0
        case Bias(b=b):
            return BIAS, len(b), 0
        case Delta(dw=dw):
            return DELTA, dw.numel(), 0
        case Rows(ids=ids):
            return ROWS, len(ids), 0
    raise TypeError(f"{type(primitive).__name__} acts at no site")


def view(packed: PackedPatch, sites: Sites, kind: int, site: int, entry: NDArray[np.int64]) -> Primitive:
    """A primitive as a patch's buffer has it; `entry` is its offset, size and flags."""
    offset, size, flags = entry.tolist()
    name, (size_in, size_out) = sites.names[site], sites.widths[site]
    read = _Reader(packed, offset)
    if kind == PROJECTION:
        a, b = read.matrices((size, size_in), (size, size_out))
        return _bottleneck(name, a, b.T, flags, read) if flags else LowRank(name, a, b.T)
    if kind == DELTA:
        return Delta(name, *read.matrices((size_out, size_in)))
    if kind == ROWS:
        return Rows(name, packed.row_ids[site], *read.matrices((size, size_in)))
    part = read.other(size)
    return Bias(name, part) if kind == BIAS else Scale(name, part, "input" if kind == SCALE_IN else "output")


class _Reader:
    """Reads a buffer, one part after another, in the type that is computed with."""

    def __init__(self, packed: PackedPatch, offset: int) -> None:
        self.packed, self.offset = packed, offset

    def matrices(self, *shapes: tuple[int, int]) -> list[Tensor]:
        """The matrices of one primitive."""
        found = [self._take(self.packed.dtypes.matrices, shape) for shape in shapes]
        if sum(map(math.prod, shapes)) % 2:
            self.offset += self.packed.dtypes.matrices.itemsize
        return found

    def other(self, *shape: int) -> Tensor:
        """Anything else."""
        return self._take(self.packed.dtypes.others, shape)

    def _take(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        start, self.offset = self.offset, self.offset + math.prod(shape) * dtype.itemsize
        return self.packed.buffer[start : self.offset].view(dtype).view(shape).to(self.packed.dtypes.others)


def _bottleneck(name: str, down: Tensor, up: Tensor, flags: int, read: _Reader) -> Bottleneck:
    size = len(up)
    biases = read.other(len(down)), read.other(size)
    norm_before = (read.other(size), read.other(size)) if flags & codes.NORM_BEFORE else None
    norm_after = (read.other(size), read.other(size)) if flags & codes.NORM_AFTER else None
    activation = list(ACTIVATIONS)[flags & codes.ACTIVATION]
    of = "output" if flags & codes.OF_OUTPUT else "stream" if flags & codes.OF_STREAM else "input"
    return Bottleneck(name, down, up, activation, of, *biases, norm_before, norm_after)  # type: ignore[arg-type]


def prefix_of(packed: PackedPatch, hidden_size: int, kv: list[KVShape]) -> Prefix | None:
    """A patch's prefix, as its buffer has it."""
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
