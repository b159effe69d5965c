"""Describe a base model as plain data, for the methods that compile adapters to it. Needs no torch.

A *site* is a named module of the base that a primitive acts on: its dotted name in transformers
(`model.layers.0.self_attn.q_proj`), PEFT's target module. Its input is the module's input, its output what it returns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


class Counted(Protocol):
    """Anything that takes `num_items` numbers on a device, of which `num_matrix_items` are of matrices."""

    @property
    def num_items(self) -> int: ...

    @property
    def num_matrix_items(self) -> int: ...


@dataclass(frozen=True)
class ItemBytes:
    """Bytes of one number on a device: of a matrix, which may be stored in fewer bits, and of anything else."""

    matrix: int = 4
    other: int = 4

    def of(self, counted: Counted) -> int:
        """Return the bytes that a primitive, patch or version takes on the device."""
        return self.matrix * counted.num_matrix_items + self.other * (counted.num_items - counted.num_matrix_items)


@dataclass(frozen=True)
class LinearSite:
    """A linear layer: `y [..., out_features] = W x [..., in_features] (+ b)`.

    `is_transposed`: the base stores W as [in, out] (GPT-2's `Conv1D`), and so does an artifact that replaces W.
    """

    in_features: int
    out_features: int
    has_bias: bool = False
    is_transposed: bool = False


@dataclass(frozen=True)
class NormSite:
    """A norm: `y [..., size] = n(x) (offset + w) (+ b)`, n without parameters; offset is 1 in Gemma, else 0."""

    size: int
    has_bias: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class LayerSites:
    """The sites of a decoder layer: the layer itself, its attention and its feed-forward block.

    `mlp` is a module whose output is added to the residual stream; with `is_mlp_whole` it is the entire block, so its
    input is the block's input; `stream` is the norm before the block, whose input is the residual stream. None: not
    found.
    """

    layer: str
    attention: str
    mlp: str | None = None
    is_mlp_whole: bool = True
    stream: str | None = None


@dataclass(frozen=True)
class KVShape:
    """The shape of a layer's KV cache: number of kv heads, and the widths of a key and of a value."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class BaseSpec:
    """The facts about a base that methods need to check and compile an adapter.

    `identity` is the digest over architecture, shapes and tokenizer. `folder` has the weights, for `base.weights`.
    `is_tied`: the head multiplies by the embedding's own rows. The embedding returns its rows times `embedding_scale`
    (Gemma: the square root of hidden_size, else 1).
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
