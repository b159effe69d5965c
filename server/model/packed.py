"""A patch in the layout of a slot: one flat buffer at true sizes, and a table that says where what lies.

The host copy has the layout of the device's, so that filling a slot is one copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store.patch import (
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
from adapters_store.spec import BaseSpec, KVShape
from server.model import hat_kernels as codes

# The kinds of the table, in the order in which they act.
SCALE_IN, SCALE_OUT, DELTA, ROWS, BRANCH, BIAS = KINDS = range(6)
OFFSET, SIZE, FLAGS = range(3)  # its columns
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
class Packed:
    """A patch in the slot's layout.

    `entries` has a row for each primitive: kind, site, offset in items, size, flags. At a
    branch's offset lie A [r, in] and B transposed [r, out]; with flags then d [r], u [out], and (gamma, beta) of each
    norm. Elsewhere lies the primitive's one tensor; of a prefix its embeddings, or layer by layer keys and values.
    """

    digest: str
    buffer: Tensor
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


def pack(patch: Patch, sites: Sites, dtype: torch.dtype) -> Packed:
    """Lay a patch out, in host memory. Raises `ValueError` where it has two of a kind at one site."""
    entries: dict[tuple[int, int], tuple[int, ...]] = {}
    parts: list[Tensor] = []
    row_ids: dict[int, Tensor] = {}
    prefix, offset = None, 0
    for primitive in patch.primitives:
        mine = [part.flatten() for part in _parts(primitive)]
        if isinstance(primitive, PrefixEmbeds | PrefixKV):
            prefix = (type(primitive), offset, primitive.num_tokens)
        else:
            kind, size, flags = _entry(primitive)
            site = sites.index[primitive.site]
            if (kind, site) in entries:
                raise ValueError(f"two primitives of one kind at {primitive.site}")
            entries[kind, site] = kind, site, offset, size, flags
            if isinstance(primitive, Rows):
                row_ids[site] = primitive.ids.to(torch.int32)
        parts += mine
        offset += sum(map(len, mine))
    table = np.array(list(entries.values()), np.int64).reshape(-1, 5)
    return Packed(patch.digest, torch.cat(parts).to(dtype), table, row_ids, prefix)


def _parts(primitive: Primitive) -> Iterator[Tensor]:
    match primitive:
        case LowRank(a=a, b=b):
            yield from (a, b.T)
        case Bottleneck(down=down, up=up):
            yield from (down, up.T)
            yield down.new_zeros(len(down)) if primitive.down_bias is None else primitive.down_bias
            yield up.new_zeros(len(up)) if primitive.up_bias is None else primitive.up_bias
            yield from (part for norm in (primitive.norm_before, primitive.norm_after) if norm for part in norm)
        case Scale(v=part) | Bias(b=part) | Delta(dw=part) | Rows(de=part) | PrefixEmbeds(embeds=part):
            yield part
        case PrefixKV(keys=keys, values=values):
            yield from (part for layer in zip(keys, values, strict=True) for part in layer)


def _entry(primitive: Primitive) -> tuple[int, int, int]:
    """Kind, size, flags."""
    match primitive:
        case LowRank():
            return BRANCH, primitive.rank, 0
        case Bottleneck():
            norms = codes.NORM_BEFORE * bool(primitive.norm_before) | codes.NORM_AFTER * bool(primitive.norm_after)
            activation = CODE_OF[primitive.activation]
            return BRANCH, len(primitive.down), codes.IS_BIASED | activation | norms | SOURCES[primitive.of]
        case Scale(v=v, on=on):
            return SCALE_IN if on == "input" else SCALE_OUT, len(v), 0
        case Bias(b=b):
            return BIAS, len(b), 0
        case Delta(dw=dw):
            return DELTA, dw.numel(), 0
        case Rows(ids=ids):
            return ROWS, len(ids), 0
    raise TypeError(f"{type(primitive).__name__} acts at no site")


def view(packed: Packed, sites: Sites, kind: int, site: int, entry: NDArray[np.int64]) -> Primitive:
    """A primitive as views of a patch's buffer; `entry` is its offset, size and flags."""
    offset, size, flags = entry.tolist()
    name, (size_in, size_out) = sites.names[site], sites.widths[site]
    take = _Reader(packed.buffer, offset)
    if kind == BRANCH:
        a, b = take(size, size_in), take(size, size_out).T
        return _bottleneck(name, a, b, flags, take) if flags else LowRank(name, a, b)
    if kind == DELTA:
        return Delta(name, take(size_out, size_in))
    if kind == ROWS:
        return Rows(name, packed.row_ids[site], take(size, size_in))
    return (
        Bias(name, take(size)) if kind == BIAS else Scale(name, take(size), "input" if kind == SCALE_IN else "output")
    )


class _Reader:
    """Takes views of a buffer, one after another."""

    def __init__(self, buffer: Tensor, offset: int) -> None:
        self.buffer, self.offset = buffer, offset

    def __call__(self, *shape: int) -> Tensor:
        start, self.offset = self.offset, self.offset + int(np.prod(shape))
        return self.buffer[start : self.offset].view(shape)


def _bottleneck(name: str, down: Tensor, up: Tensor, flags: int, take: _Reader) -> Bottleneck:
    size = len(up)
    biases = take(len(down)), take(size)
    norm_before = (take(size), take(size)) if flags & codes.NORM_BEFORE else None
    norm_after = (take(size), take(size)) if flags & codes.NORM_AFTER else None
    activation = list(ACTIVATIONS)[flags & codes.ACTIVATION]
    of = "output" if flags & codes.OF_OUTPUT else "stream" if flags & codes.OF_STREAM else "input"
    return Bottleneck(name, down, up, activation, of, *biases, norm_before, norm_after)  # type: ignore[arg-type]


def prefix_of(packed: Packed, hidden_size: int, kv: list[KVShape]) -> Prefix | None:
    """A patch's prefix, as views of its buffer."""
    if packed.prefix is None:
        return None
    kind, offset, num_tokens = packed.prefix
    take = _Reader(packed.buffer, offset)
    if kind is PrefixEmbeds:
        return PrefixEmbeds(take(num_tokens, hidden_size))
    layers = []
    for shape in kv:
        key = take(num_tokens, shape.num_kv_heads, shape.key_dim)
        layers.append((key, take(num_tokens, shape.num_kv_heads, shape.value_dim)))
    keys, values = zip(*layers, strict=True)
    return PrefixKV(keys, values)
