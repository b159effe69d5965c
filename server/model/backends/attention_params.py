"""Parameters of a layer's attention, and the formulas on its inputs that every backend is held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adapters_store.base.spec import KVShape


@dataclass(frozen=True)
class AttentionParams:
    """Parameters of one layer: the factor of scores, how many positions a query sees (0: all), soft cap (0: none)."""

    scaling: float
    window: int = 0
    cap: float = 0.0


class KVLayer(NamedTuple):
    """Keys and values of one layer. `keys` and `values` [num_blocks, ...] have the shapes of `Backend.block_shapes`."""

    keys: Tensor
    values: Tensor
    block_size: int
    shape: KVShape


def num_heads(width: int, shape: KVShape) -> int:
    """Return how many query heads are in qkv [T, width]."""
    return (width - shape.num_kv_heads * (shape.key_dim + shape.value_dim)) // shape.key_dim


def split(qkv: Tensor, shape: KVShape, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv into query [T, heads, d], key [T, kv heads, d] and value [T, kv heads, d_v], the first two rotated."""
    heads = num_heads(qkv.shape[1], shape)
    sizes = [heads * shape.key_dim, shape.num_kv_heads * shape.key_dim, shape.num_kv_heads * shape.value_dim]
    query, key, value = (part.unflatten(1, (n, -1)) for part, n in zip(
        qkv.split(sizes, 1), (heads, shape.num_kv_heads, shape.num_kv_heads), strict=True
    ))  # fmt: skip
    return rotate_reference(query, cos, sin), rotate_reference(key, cos, sin), value


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of x [T, heads, d] by cos, sin [T, rotated], halves against each other (RoPE).

    arXiv:2104.09864.
    """
    rotated, rest = x[..., : cos.shape[1]], x[..., cos.shape[1] :]
    left, right = rotated.chunk(2, -1)
    rotated = rotated * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]
    return torch.cat([rotated, rest], -1)
