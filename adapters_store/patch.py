"""The primitives that every method compiles to, and what a base looks like to a compiler.

A *patch* is an artifact compiled to primitives for one base. A *site* is a named place in the base where a
primitive acts: the dotted name of a module, as transformers names it (`model.layers.0.self_attn.q_proj`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LinearSite:
    """A linear layer of the base: `y [..., out_features] = W x [..., in_features] (+ b)`."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class BaseSpec:
    """All that a method must know of the base to check and compile an artifact for it.

    `identity` is the digest over architecture, shapes and tokenizer; `linears` maps each linear site to its shape.
    """

    name: str
    identity: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    linears: dict[str, LinearSite] = field(default_factory=dict)


@dataclass(frozen=True)
class LowRank:
    """`y += B (A x)` at `site`: A [r, in], B [out, r] with the scale folded in once (LoRA, arXiv:2106.09685)."""

    site: str
    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def num_parameters(self) -> int:
        return self.a.numel() + self.b.numel()


Primitive = LowRank  # the Families issue makes this a union


@dataclass(frozen=True)
class Patch:
    """An artifact compiled to primitives for one base."""

    digest: str
    method: str
    primitives: tuple[Primitive, ...]

    @property
    def num_parameters(self) -> int:
        return sum(primitive.num_parameters for primitive in self.primitives)
