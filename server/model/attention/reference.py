"""Attention in plain torch, to which the fast paths are held."""

from __future__ import annotations

import torch
from torch import Tensor

from server.model.attention.paged_batch import PagedBatch
from server.model.backends.attention_params import AttentionParams, split


def attend_reference(
    batch: PagedBatch, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, params: AttentionParams
) -> Tensor:
    """Compute `attend` in plain torch on any device: gather each sequence's K and V, softmax(q k^T) v."""
    cache, shape, device = batch.cache, batch.cache.shapes[layer], qkv.device
    query, key, value = split(qkv, shape, cos, sin)
    heads = query.shape[1]
    blocks = torch.from_numpy(batch.spans.token_blocks).to(device)
    cache.store(layer, blocks, torch.from_numpy(batch.spans.token_offsets).to(device), key, value)
    out = []
    for sequence, (first, count, start) in enumerate(batch.spans.spans):
        length = start + count
        table = torch.from_numpy(batch.spans.block_table[sequence, : -(-length // cache.block_size)]).to(device)
        k = cache.keys[layer][table, :, :, : cache.block_size].permute(0, 3, 1, 2).flatten(0, 1)[:length]
        v = cache.values[layer][table, :, :, : shape.value_dim].transpose(1, 2).flatten(0, 1)[:length]
        k, v = k.to(query.dtype), v.to(query.dtype)
        k, v = (part.repeat_interleave(heads // shape.num_kv_heads, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query[first : first + count], k).float() * params.scaling
        if params.cap:
            scores = params.cap * torch.tanh(scores / params.cap)
        distance = torch.arange(start, length, device=device)[:, None] - torch.arange(length, device=device)
        hidden = (distance < 0) | (distance >= (params.window or length))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(out)
