"""Parameters of a layer's attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters_store.base.spec import KVShape


@dataclass(frozen=True)
class AttentionParams:
    """How one layer attends: the factor of scores, how many positions a query sees (0: all), the soft cap (0: none)."""

    scaling: float
    window: int = 0
    cap: float = 0.0

    def numbers(self) -> tuple[np.float32, int, np.float32]:
        """As the kernels take them."""
        return np.float32(self.scaling), self.window, np.float32(self.cap)


def num_heads(width: int, shape: KVShape) -> int:
    """Query heads in qkv [T, width]."""
    return (width - shape.num_kv_heads * (shape.key_dim + shape.value_dim)) // shape.key_dim


def split(qkv: Tensor, shape: KVShape, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query [T, heads, d], key [T, kv heads, d] and value [T, kv heads, d_v], the first two turned."""
    heads = num_heads(qkv.shape[1], shape)
    sizes = [heads * shape.key_dim, shape.num_kv_heads * shape.key_dim, shape.num_kv_heads * shape.value_dim]
    query, key, value = (part.unflatten(1, (n, -1)) for part, n in zip(
        qkv.split(sizes, 1), (heads, shape.num_kv_heads, shape.num_kv_heads), strict=True
    ))  # fmt: skip
    return rotate_reference(query, cos, sin), rotate_reference(key, cos, sin), value


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first dimensions of x [T, heads, d] by cos, sin [T, turned], halves against each other (RoPE).

    arXiv:2104.09864.
    """
    rotated, rest = x[..., : cos.shape[1]], x[..., cos.shape[1] :]
    left, right = rotated.chunk(2, -1)
    rotated = rotated * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]
    return torch.cat([rotated, rest], -1)
