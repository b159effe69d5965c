"""The primitives: the small instruction set that every method compiles to.

A *patch* is an adapter compiled to primitives for one base. At a site with input x and output y = f(x) primitives act
in this order, whatever their order in the patch, and also if one row uses several patches:

1. `Scale` on the input:      x *= v                      f and all later steps see the scaled input
2. `Scale` on the output:     y *= v                      scales what the base computed, not what patches add
3. `Delta`, `Rows`, `LowRank`, `Bias`, `Bottleneck` of the input or stream:  y += what each computes from x
4. `Bottleneck` of the output: y += what it computes from y, one after another in the order of the patches

A patch may be used with a weight w, which multiplies each update (`y += w B A x`, `y *= 1 + w (v - 1)`): 0 gives the
base, 1 the whole patch. Each primitive's `update` is its formula in plain torch, the reference for the kernels.

Every primitive counts the numbers that it takes in an adapter slot: `num_items` in all, of which `num_matrix_items` are
of matrices, which a device may store in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: Mapping[str, Activation] = {
    "none": lambda t: t,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
}
NORM_EPS = 1e-5  # of torch.nn.LayerNorm


def even(num_items: int) -> int:
    """Round up to an even number of items, so that what follows a matrix stored in 16 bits stays aligned to 32 bits."""
    return num_items + num_items % 2


class Stored:
    """Tensors that a slot holds of a primitive: `matrices`, which a device may keep in fewer bits, then `vectors`."""

    def matrices(self) -> tuple[Tensor, ...]:
        """Return the matrices, as they lie one behind another."""
        return ()

    def vectors(self) -> tuple[Tensor, ...]:
        """Return all other tensors, which lie behind the matrices and are never kept in fewer bits."""
        return ()

    @property
    def num_matrix_items(self) -> int:
        """Count the numbers of the matrices, padding included."""
        return even(sum(tensor.numel() for tensor in self.matrices()))

    @property
    def num_items(self) -> int:
        """Count the numbers that a slot holds, each as one item."""
        return self.num_matrix_items + sum(tensor.numel() for tensor in self.vectors())


@dataclass(frozen=True)
class LowRank(Stored):
    """`y += B (A x)` at a linear: A [r, in], B [out, r] with the scale folded in (LoRA, arXiv:2106.09685)."""

    site: str
    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def matrices(self) -> tuple[Tensor, ...]:
        """Return A [r, in] and B transposed [r, out]."""
        return self.a, self.b.T

    def update(self, x: Tensor) -> Tensor:
        """Compute B (A x), which is added to y: x [..., in] -> [..., out]."""
        return (x @ self.a.T) @ self.b.T


@dataclass(frozen=True)
class Scale(Stored):
    """`y *= v` (v [out]) or, on the input, `x *= v` (v [in]): (IA)3, arXiv:2205.05638; DoRA's magnitude; norms."""

    site: str
    v: Tensor
    on: Literal["input", "output"] = "output"

    def vectors(self) -> tuple[Tensor, ...]:
        """Return the one vector v."""
        return (self.v,)

    def factor(self, weight: float) -> Tensor:
        """Compute the factor of x or y for an adapter weight: 1 + weight (v - 1), of v's shape."""
        return 1 + weight * (self.v - 1)


@dataclass(frozen=True)
class Bias(Stored):
    """`y += b`, b [out]: BitFit, arXiv:2106.10199."""

    site: str
    b: Tensor

    def vectors(self) -> tuple[Tensor, ...]:
        """Return the one vector b."""
        return (self.b,)

    def update(self, x: Tensor) -> Tensor:
        """Expand b for every row: x [..., in] -> [..., out]."""
        return self.b.expand(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Bottleneck(Stored):
    """`y += N(U act(D M(h) + d) + u)`: D [m, size], U [size, m], h the site's output (sequential) or input (parallel).

    With `of="stream"`, at a feed-forward block, h is the residual stream that the norm before the block reads.
    Scaling is folded into U and u. M and N are optional layer norms, (gamma, beta) of [size] each. Houlsby
    (arXiv:1902.00751), Pfeiffer (arXiv:2005.00247), parallel (arXiv:2110.04366).
    """

    site: str
    down: Tensor
    up: Tensor
    activation: str
    of: Literal["input", "output", "stream"] = "output"
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    norm_before: tuple[Tensor, Tensor] | None = None
    norm_after: tuple[Tensor, Tensor] | None = None

    def matrices(self) -> tuple[Tensor, ...]:
        """Return D [m, size] and U transposed [m, size]."""
        return self.down, self.up.T

    def vectors(self) -> tuple[Tensor, ...]:
        """Return both biases, zeros if there is none, and (gamma, beta) of each norm that there is."""
        down_bias = self.down.new_zeros(len(self.down)) if self.down_bias is None else self.down_bias
        up_bias = self.up.new_zeros(len(self.up)) if self.up_bias is None else self.up_bias
        norms = [norm for norm in (self.norm_before, self.norm_after) if norm]
        return (down_bias, up_bias, *(part for norm in norms for part in norm))

    def update(self, h: Tensor) -> Tensor:
        """Compute what is added to y: h [..., size] -> [..., size]."""
        if self.norm_before is not None:
            h = functional.layer_norm(h, h.shape[-1:], *self.norm_before, NORM_EPS)
        h = functional.linear(h, self.down, self.down_bias)
        h = functional.linear(ACTIVATIONS[self.activation](h), self.up, self.up_bias)
        if self.norm_after is not None:
            h = functional.layer_norm(h, h.shape[-1:], *self.norm_after, NORM_EPS)
        return h


@dataclass(frozen=True)
class Delta(Stored):
    """`y += dW x` at a linear, dW [out, in] in full: selective tuning, and updates that are not low-rank."""

    site: str
    dw: Tensor

    def matrices(self) -> tuple[Tensor, ...]:
        """Return the one matrix dW."""
        return (self.dw,)

    def update(self, x: Tensor) -> Tensor:
        """Compute dW x, which is added to y: x [..., in] -> [..., out]."""
        return x @ self.dw.T


@dataclass(frozen=True)
class Rows(Stored):
    """Changed rows of the embedding or head: `ids` [n] (ascending, int64) changed by dE [n, size] (trainable tokens).

    At the embedding `y += dE[j]` for the token ids[j]; at the head `y[ids] += dE x`.
    """

    site: str
    ids: Tensor
    de: Tensor

    @property
    def num_items(self) -> int:
        """Count the rows and the ids, one item each."""
        return self.num_matrix_items + len(self.ids)

    def matrices(self) -> tuple[Tensor, ...]:
        """Return the one matrix dE."""
        return (self.de,)


@dataclass(frozen=True)
class PrefixEmbeds(Stored):
    """Virtual leading positions with the input embeddings E [n, size]: prompt tuning (arXiv:2104.08691), p-tuning."""

    embeds: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.embeds)

    def vectors(self) -> tuple[Tensor, ...]:
        """Return the embeddings E."""
        return (self.embeds,)


@dataclass(frozen=True)
class PrefixKV(Stored):
    """Virtual leading positions whose keys and values are given: prefix tuning (arXiv:2101.00190).

    Per layer keys [n, kv heads, key_dim] as the cache stores them, after rotation, and values [n, kv heads, value_dim].
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.keys[0])

    def vectors(self) -> tuple[Tensor, ...]:
        """Return keys and values, layer by layer."""
        return tuple(part for layer in zip(self.keys, self.values, strict=True) for part in layer)


Primitive = LowRank | Scale | Bias | Bottleneck | Delta | Rows | PrefixEmbeds | PrefixKV
Prefix = PrefixEmbeds | PrefixKV


@dataclass(frozen=True)
class Patch:
    """An adapter compiled to primitives for one base: at most one primitive of a kind per site, and at most one prefix.

    `digest` identifies the artifact. `num_parameters` counts the artifact's own trained numbers,
    whatever they compile to.
    """

    digest: str
    method: str
    primitives: tuple[Primitive, ...]
    num_parameters: int = 0

    @property
    def num_items(self) -> int:
        """Count the numbers that a slot holds for this patch."""
        return sum(primitive.num_items for primitive in self.primitives)

    @property
    def num_matrix_items(self) -> int:
        """Count the matrix numbers among `num_items`: a device may store them in 16 bits, all others take 32."""
        return sum(primitive.num_matrix_items for primitive in self.primitives)

    @property
    def prefix(self) -> Prefix | None:
        """Return the virtual leading positions, or None."""
        return next((p for p in self.primitives if isinstance(p, PrefixEmbeds | PrefixKV)), None)

    @property
    def num_virtual(self) -> int:
        """Count the virtual positions that are placed before a prompt."""
        return 0 if self.prefix is None else self.prefix.num_tokens
