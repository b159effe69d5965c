"""Attention over the paged cache in torch ops, for any device. Not run on a GPU yet.

Sequences of a step are put into groups of about equal numbers of queries, padded to the longest of the group, so that
a step of any batch is a few calls of SDPA: one for all that decode, and seldom more than two for chunks of prompts.
Where everything lies is told by arrays that are made on the host and sent once a step: nothing here reads the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from server.model.backends.attention_params import AttentionParams, KVLayer
from server.model.backends.base import Copies, Spans
from server.model.backends.torch_ops.copies import DeviceCopies


@dataclass(frozen=True)
class QueryGroup:
    """S sequences of up to Q queries and B blocks; `seen` keeps the masks of layers that are alike."""

    tokens: Tensor  # [S, Q] of the batch; padding repeats the last
    positions: Tensor  # [S, Q] of each query
    lengths: Tensor  # [S] positions that are written
    table: Tensor  # [S, B]
    seen: dict[tuple[int, int], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Padded:
    """Rows of one step. `places` [T] has each token's place in the groups' rows of queries, side by side."""

    token_blocks: Tensor  # [T] the block that each token's K and V go to
    token_offsets: Tensor  # [T] and the place in it
    places: Tensor
    groups: list[QueryGroup]


def lay_out(step: Spans, block_size: int, copies: Copies) -> Padded:
    """Group the sequences, and send where everything lies."""
    spans, table, token_blocks, token_offsets = step
    members: dict[int, list[int]] = {}
    for sequence, (_, count, _) in enumerate(spans):
        members.setdefault((count - 1).bit_length(), []).append(sequence)  # 1, 2, 3-4, 5-8, … queries
    places = np.empty(len(token_blocks), np.int64)
    arrays, end = [token_blocks, token_offsets, places], 0
    for sequences in members.values():
        first, count, start = np.array([spans[sequence] for sequence in sequences], np.int64).T[:, :, None]
        steps = np.arange(count.max())
        is_query = steps < count
        steps = np.minimum(steps, count - 1)
        places[(first + steps)[is_query]] = end + np.flatnonzero(is_query)
        num_blocks = -(-int((start + count).max()) // block_size)
        arrays += [first + steps, start + steps, (start + count)[:, 0], table[sequences, :num_blocks]]
        end += is_query.size
    blocks, offsets, where, *rest = copies.send(*arrays)
    groups = [QueryGroup(*parts) for parts in zip(rest[::4], rest[1::4], rest[2::4], rest[3::4], strict=True)]
    return Padded(blocks, offsets, where, groups)


def graph_columns(step: Spans, num_blocks: int, block_size: int) -> Tensor:
    """Return [S, 6 + num_blocks] of S rows of one token: block, offset, place, query, position, length, blocks."""
    padded = lay_out(step, block_size, DeviceCopies("cpu"))
    (group,) = padded.groups
    columns = [padded.token_blocks, padded.token_offsets, padded.places, group.tokens[:, 0], group.positions[:, 0]]
    table = torch.zeros(len(padded.places), num_blocks, dtype=torch.int64)
    table[:, : group.table.shape[1]] = group.table
    return torch.cat([torch.stack([*columns, group.lengths], 1), table], 1)


def graph_layout(columns: Tensor, num_blocks: int) -> Padded:
    """Return the layout that reads the columns [6 + num_blocks, S] of `graph_columns`."""
    blocks, offsets, places, queries, positions, lengths = columns[:6]
    group = QueryGroup(queries[:, None], positions[:, None], lengths, columns[6 : 6 + num_blocks].T)
    return Padded(blocks, offsets, places, [group])


def attend(padded: Padded, qkv: tuple[Tensor, Tensor, Tensor], layer: KVLayer, params: AttentionParams) -> Tensor:
    """Attend causally with q [T, heads, d], whose k and v [T, kv heads, d or d_v] are in the cache: [T, heads, d_v]."""
    (query, key, value), (keys, values, block_size, _shape) = qkv, layer
    heads, kv_heads, out = query.shape[1], key.shape[1], []
    for group in padded.groups:
        num_sequences, num_queries = group.tokens.shape
        num_positions = group.table.shape[1] * block_size
        # What is stale may be anything, and what is not finite times a weight of 0 is not 0.
        stale = torch.arange(num_positions, device=query.device) >= group.lengths[:, None]
        table = group.table.flatten()
        k = keys.index_select(0, table)[..., :block_size].unflatten(0, group.table.shape)
        k = k.permute(0, 2, 1, 4, 3).reshape(num_sequences, kv_heads, num_positions, -1)
        v = values.index_select(0, table)[..., : value.shape[-1]].unflatten(0, group.table.shape)
        v = v.transpose(1, 2).reshape(num_sequences, kv_heads, num_positions, -1)
        k, v = (part.masked_fill(stale[:, None, :, None], 0.0) for part in (k, v))
        # The queries of the heads that share keys are rows of one product.
        q = query.index_select(0, group.tokens.flatten()).view(num_sequences, num_queries, kv_heads, -1, query.shape[2])
        q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)
        attended = _weigh(q, k, v, _seen(group, num_positions, params.window, heads // kv_heads), params)
        attended = attended.unflatten(2, (-1, num_queries)).permute(0, 3, 1, 2, 4)
        out.append(attended.reshape(num_sequences * num_queries, heads, -1))
    return torch.cat(out).index_select(0, padded.places)


def _seen(group: QueryGroup, num_positions: int, window: int, num_heads: int) -> Tensor:
    """Return [S, 1, heads * Q, positions]: what is not behind a query, and in its window."""
    if (window, num_heads) not in group.seen:
        distance = group.positions[:, :, None] - torch.arange(num_positions, device=group.positions.device)
        seen = distance >= 0
        seen = seen & (distance < window) if window else seen
        group.seen[window, num_heads] = seen.repeat(1, num_heads, 1)[:, None]
    return group.seen[window, num_heads]


def _weigh(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, params: AttentionParams) -> Tensor:
    """Compute softmax(cap tanh(scaling q k^T / cap)) v; SDPA knows no soft cap."""
    if not params.cap:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=params.scaling)
    scores = params.cap * torch.tanh((q @ k.transpose(-1, -2)).float() * (params.scaling / params.cap))
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype) @ v
