"""Attention over a paged KV cache, as one function that transformers' modules and ours call."""

from __future__ import annotations

from torch import Tensor

from server.model.attention.paged_batch import PagedBatch
from server.model.backends.attention_params import AttentionParams


def attend(batch: PagedBatch, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, params: AttentionParams) -> Tensor:
    """Store k and v, and attend: qkv [T, heads * d + kv heads * (d + d_v)] -> [T, heads, d_v].

    cos and sin [T, rotated d] rotate queries and keys; [T, 0] if the base does not rotate them, or has done so.
    """
    cache = batch.cache
    return cache.backend.attend(batch.layout, cache.layers[layer], qkv, cos, sin, params)
