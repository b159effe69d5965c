"""Attention over a paged KV cache, as one function that transformers' modules call.

`install` registers it under the name `manyhats` with transformers' attention interface. What a step looks like
(`PagedBatch`) reaches it as the keyword argument `paged` of the model's forward.
"""

from __future__ import annotations

from torch import Tensor

from server.model.attention.paged_batch import PagedBatch
from server.model.attention.params import AttentionParams, num_heads, split
from server.model.backends import cpu
from server.model.backends.cpu import attention as cpu_attention
from server.model.backends.torch_ops import attention as torch_attention


def attend(batch: PagedBatch, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, params: AttentionParams) -> Tensor:
    """Store k and v, and attend: qkv [T, heads * d + kv heads * (d + d_v)] -> [T, heads, d_v].

    cos and sin [T, rotated d] turn queries and keys; [T, 0] where the base does not turn them, or has done so.
    """
    cache, shape = batch.cache, batch.cache.shapes[layer]
    if not cpu.supports(qkv.device.type, qkv.dtype):
        return _attend_torch(batch, layer, qkv, cos, sin, params)
    out = qkv.new_empty(len(qkv), num_heads(qkv.shape[1], shape), shape.value_dim)
    cpu_attention.attend(
        qkv.numpy(),
        cos.numpy(),
        sin.numpy(),
        *cache.arrays(layer),
        cache.block_size,
        *batch.arrays(),
        params.numbers(),
        out.numpy(),
    )
    return out


def _attend_torch(
    batch: PagedBatch, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, params: AttentionParams
) -> Tensor:
    """In torch ops over padded sequences, on devices that have no kernel of ours."""
    cache, laid_out = batch.cache, batch.padded
    if laid_out is None:
        raise TypeError("a batch of another device")
    parts = split(qkv, cache.shapes[layer], cos, sin)
    cache.store(layer, laid_out.token_blocks, laid_out.token_offsets, *parts[1:])
    of_layer = cache.keys[layer], cache.values[layer], cache.block_size
    return torch_attention.attend(laid_out, parts, *of_layer, params.scaling, params.window, params.cap)
