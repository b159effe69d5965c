"""The seam for compute backends: protocols of all that a backend is asked, with shapes and units.

A step has T tokens of S sequences, of which R rows are sampled. Tensors are on the backend's device, activations in its
compute type (`dtypes.others`). A backend is chosen once, at load (`choose`); every room above holds it, and binds what
it calls often once. All methods are called by the engine's thread between or in steps, unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store.base.spec import KVShape
from server.model.backends.attention_params import AttentionParams, KVLayer
from server.model.backends.reference import Find
from server.model.precision import StorageDtypes
from server.model.row_adapters import Acts, RowAdapters, SiteGroup

Linear = Callable[[Tensor], Tensor]  # x [..., in] -> y [..., out], the bias added
PackLinear = Callable[[Tensor, Tensor | None], Linear]  # weight [out, in], bias [out]
Layout = Any  # a backend's own layout of a step's rows over the KV cache, made by `lay_out`
Prepared = Any  # a backend's own form of what the rows of a step use, made by `AdapterOps.prepare`


class Spans(NamedTuple):
    """The rows of one step over the blocks of the KV cache, on the host."""

    spans: list[tuple[int, int, int]]  # per sequence: first token in the batch, number of tokens, first position
    block_table: NDArray[np.int64]  # [S, blocks of the longest]
    token_blocks: NDArray[np.int64]  # [T] the block that each token's K and V go to
    token_offsets: NDArray[np.int64]  # [T] and the place in it


class NormPart(NamedTuple):
    """An RMS norm: weight [size] in fp32, and its site."""

    weight: Tensor
    eps: float
    group: SiteGroup


class LinearPart(NamedTuple):
    """A product that `pack_linear` made, and the sites whose outputs it has side by side."""

    product: Linear
    group: SiteGroup


class DecoderLayer(NamedTuple):
    """A recognised layer: h + attention(norm(h)), then h + mlp(norm(h)). `gate` is one of `codes.GATE_CODES`."""

    input_norm: NormPart
    qkv: LinearPart
    layer: int
    params: AttentionParams
    is_rotated: bool
    out: LinearPart
    attention_group: SiteGroup
    mlp_norm: NormPart
    gate_up: LinearPart
    gate: int
    down: LinearPart
    mlp_group: SiteGroup
    group: SiteGroup


class WholeDecoder(Protocol):
    """Computes all layers of a base in one call, to the same bits as the parts give one by one."""

    def __call__(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        layout: Layout,
        kv: Sequence[KVLayer],
        adapters: Prepared,
        norm: NormPart | None,
    ) -> Tensor:
        """Compute hidden [T, size] -> [T, size] through the layers, and through `norm` behind them if there is one.

        rotary = (cos, sin), each [T, rotated]. `kv` is the same object in every step of one cache.
        """
        ...


class Copies(Protocol):
    """Copies from the host to the device."""

    device: torch.device

    def pin(self, host: Tensor) -> Tensor:
        """Return the same in memory that the device reads by itself; any thread."""
        ...

    def start(self, key: Hashable, host: Iterable[Tensor]) -> list[Tensor]:
        """Begin to copy pinned tensors; nothing may read what is returned before `wait` was called with this key."""
        ...

    def wait(self, key: Hashable) -> None:
        """Make what is computed from now on wait for a copy."""
        ...

    def release(self, key: Hashable) -> None:
        """Forget a copy: what was copied is used no more."""
        ...

    def send(self, *arrays: NDArray[Any]) -> list[Tensor]:
        """Copy a step's small arrays to the device."""
        ...


class AdapterOps(Protocol):
    """Applies the adapters in the slots of one base to a step's rows. Made by `Backend.adapters`, one per base.

    The slots tell it when a slot is filled and freed, ask it once a step to prepare, and hand what it prepared to the
    calls of that step. It is called for a site only if something acts there in the step.
    """

    def insert(self, slot: int, buffer: Tensor, row_ids: dict[int, Tensor]) -> None:
        """Note that a slot holds a patch: `buffer` (uint8) on the device, and the int32 ids of `Rows` by site."""
        ...

    def drop(self, slot: int) -> None:
        """Note that a slot is free."""
        ...

    def prepare(
        self, tokens: RowAdapters, sampled: RowAdapters, acts: Acts, table: NDArray[np.int64]
    ) -> tuple[Prepared, Prepared]:
        """Prepare a step for its T tokens and its R sampled rows, which the head sees.

        table [kinds, sites, slots, 3] has the offset in bytes, the size and the flags of each primitive.
        """
        ...

    def scale_input(self, site: int, x: Tensor, prepared: Prepared) -> None:
        """Scale the input x [rows, in] of a site in place (`SCALE_IN`)."""
        ...

    def apply(self, group: SiteGroup, x: Tensor, stream: Tensor, y: Tensor, prepared: Prepared) -> None:
        """Change y [rows, out] in place by all else that acts at sites that share the input x [rows, in].

        A few bottlenecks read the residual stream [rows, size]. Rows may be a multiple of what was prepared: each row
        so many times, at norms over heads.
        """
        ...

    def embed_rows(self, site: int, token_ids: Tensor, y: Tensor, prepared: Prepared) -> None:
        """Change the embeddings y [T, size] of token_ids [T] in place where adapters changed rows (`ROWS`)."""
        ...


class Backend(Protocol):
    """Computes a base and its adapters on one device."""

    name: str
    device: str
    precision: str
    dtypes: StorageDtypes  # of matrices, keys and values; and of everything else, activations among it

    @property
    def copies(self) -> Copies:
        """The copies from the host to this backend's device; one object for its life."""
        ...

    def set_num_threads(self, num_threads: int) -> None:
        """Compute with so many threads of the host; before anything is loaded."""
        ...

    def wake(self) -> None:
        """Begin whatever precedes the first kernel, beside this thread: the stock model has just been read."""
        ...

    def rounded(self, weight: Tensor) -> Tensor:
        """Return what `pack_linear` keeps of a weight [out, in] in its type; the same tensor if that is all of it.

        Raises `UnsupportedBaseError` if a value does not fit.
        """
        ...

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Pack a weight [out, in] and a bias [out] once, for products with any number of rows."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return weight * x / sqrt(mean(x^2) + eps) of x [..., size] (arXiv:1910.07467)."""
        ...

    def gate(self, gate_up: Tensor, gate: int) -> Tensor:
        """Return act(g) u [..., n] of gate_up [..., 2n] = (g, u), `gate` one of `codes.GATE_CODES`."""
        ...

    def block_shapes(self, shape: KVShape, block_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of one block of keys and of values in the cache."""
        ...

    def store_kv(self, layer: KVLayer, blocks: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
        """Write keys [n, kv heads, dim] and values [n, kv heads, d_v] to places [n] in blocks [n] of the cache."""
        ...

    def lay_out(self, spans: Spans, block_size: int, num_kv_heads: int, num_threads: int) -> Layout:
        """Lay a step's rows out for `attend`; once a step, for all layers."""
        ...

    def attend(
        self, layout: Layout, layer: KVLayer, qkv: Tensor, cos: Tensor, sin: Tensor, params: AttentionParams
    ) -> Tensor:
        """Store k and v, and attend causally: qkv [T, heads * d + kv heads * (d + d_v)] -> [T, heads, d_v].

        cos and sin [T, rotated] rotate queries and keys; [T, 0] if the base does not, or has done so. What is stale in
        a block may be anything, and is never read.
        """
        ...

    def adapters(self, find: Find) -> AdapterOps:
        """Make the operations for the slots of one base, in which `find` finds primitives."""
        ...

    def whole_decoder(self, layers: Sequence[DecoderLayer]) -> WholeDecoder | None:
        """Return all layers as one call, or None if this backend computes them part by part."""
        ...

    def best_tokens(self, logits: Tensor) -> Tensor:
        """Return the first of the largest of each row of logits [R, vocabulary], -1 if one is not finite: [R]."""
        ...


@runtime_checkable
class GraphBackend(Protocol):
    """A backend whose decode steps can be recorded as CUDA graphs: its layout is a tensor that is written anew."""

    def graph_columns(self, spans: Spans, num_blocks: int, block_size: int) -> Tensor:
        """Return the layout of S rows of one token on the host: int64 [S, columns], tables of `num_blocks`."""
        ...

    def graph_layout(self, columns: Tensor, num_blocks: int) -> Layout:
        """Return the layout that reads such columns [columns, S] on the device."""
        ...
