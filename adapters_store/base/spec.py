"""What a base looks like to whoever compiles an artifact for it: data, without torch.

A *site* is a named place in the base where a primitive acts: the dotted name of a module, as transformers names it
(`model.layers.0.self_attn.q_proj`). Its input is what the module is called with, its output what it returns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


class Counted(Protocol):
    """A primitive, a patch or a version: so many numbers, of which so many are of matrices."""

    @property
    def num_items(self) -> int: ...

    @property
    def num_matrix_items(self) -> int: ...


@dataclass(frozen=True)
class ItemBytes:
    """What a number takes on a device, which may keep those of matrices in fewer bits."""

    matrix: int = 4
    other: int = 4

    def of(self, counted: Counted) -> int:
        """What it takes."""
        return self.matrix * counted.num_matrix_items + self.other * (counted.num_items - counted.num_matrix_items)


@dataclass(frozen=True)
class LinearSite:
    """A linear layer: `y [..., out_features] = W x [..., in_features] (+ b)`.

    `is_transposed` says that the base keeps W as [in, out] (GPT-2's `Conv1D`), and so do artifacts that replace it.
    """

    in_features: int
    out_features: int
    has_bias: bool = False
    is_transposed: bool = False


@dataclass(frozen=True)
class NormSite:
    """A norm: `y [..., size] = n(x) (offset + w) (+ b)`, where n has no parameters; offset is 1 in Gemma, else 0."""

    size: int
    has_bias: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class LayerSites:
    """One decoder layer: its own site and those of its attention and of its feed-forward block.

    `mlp` is a module that returns what is added to the residual stream; `is_mlp_whole` says whether that module is the
    whole block, so that its input is the block's input too; `stream` is the norm before it, whose input is the residual
    stream. None where no such module was found.
    """

    layer: str
    attention: str
    mlp: str | None = None
    is_mlp_whole: bool = True
    stream: str | None = None


@dataclass(frozen=True)
class KVShape:
    """Of one layer's cache: number of kv heads, and the widths of a key and of a value."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class BaseSpec:
    """All that a method must know of the base to check and compile an artifact for it.

    `identity` is the digest over architecture, shapes and tokenizer; `folder` is where its weights can be read
    (`adapters_store.base.weights`); `is_tied` says that the head multiplies by the embedding's own rows; the embedding
    returns its rows times `embedding_scale` (Gemma: the square root of hidden_size, else 1).
    """

    name: str
    identity: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    linears: dict[str, LinearSite] = field(default_factory=dict)
    norms: dict[str, NormSite] = field(default_factory=dict)
    layers: list[LayerSites] = field(default_factory=list)
    kv: list[KVShape] = field(default_factory=list)
    embedding: str = ""
    embedding_size: int = 0
    embedding_scale: float = 1.0
    head: str = ""
    is_tied: bool = False
    folder: str = ""
