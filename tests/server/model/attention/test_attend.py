"""Attention over the paged cache: the fast kernel against its slow twin, and what no neighbour may change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapters_store.base.spec import KVShape
from server.core import Row
from server.model.attention.attend import attend
from server.model.attention.kv_cache import KVCache
from server.model.attention.paged_batch import PagedBatch, page
from server.model.attention.reference import attend_reference
from server.model.backends.attention_params import AttentionParams
from server.model.backends.base import Backend
from server.model.backends.cpu.backend import CpuBackend

BLOCK = 8
WHOLE = 16  # a block whose positions fill panels: the scores of many are softened at once


def make_cache(
    num_blocks: int = 24,
    kv_heads: int = 2,
    dim: int = 16,
    value_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    block: int = BLOCK,
    backend: Backend | None = None,
) -> KVCache:
    backend = backend or CpuBackend("fp32" if dtype == torch.float32 else "fp16")
    cache = KVCache([KVShape(kv_heads, dim, value_dim)], num_blocks, block, backend)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(torch.nan)  # what is stale must never be read
    return cache


def make_qkv(num_tokens: int, heads: int = 6, kv_heads: int = 2, dim: int = 16, value_dim: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, heads * dim + kv_heads * (dim + value_dim), generator=generator)


def make_turns(num_tokens: int, rotated: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(num_tokens, rotated, generator=torch.Generator().manual_seed(rotated))
    return angles.cos(), angles.sin()


def whole(rows: list[Row], cache: KVCache, threads: int = 2) -> PagedBatch:
    return page(rows, cache, threads)


LENGTHS = (1, 5, 8, 37, 70, 530)
ROWS = [Row([0] * n, 0, list(range(at * 9, at * 9 + -(-n // BLOCK)))) for at, n in enumerate(LENGTHS)]
NUM_BLOCKS = 5 * 9 + 67


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (11, 0.0), (0, 2.0), (5, 3.0), (1, 0.0)])
@pytest.mark.parametrize(("value_dim", "rotated"), [(16, 0), (24, 16), (32, 8)])
@pytest.mark.parametrize("block", [BLOCK, WHOLE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_equals_its_twin(
    window: int, cap: float, value_dim: int, rotated: int, dtype: torch.dtype, block: int
) -> None:
    """The kernel computes what plain torch computes: all lengths, windows, soft caps, widths and turns in one batch.

    Also where keys and values are kept in 16 bits: they are rounded alike, but for ties of what was turned.
    """
    qkv, rotary = make_qkv(sum(LENGTHS), value_dim=value_dim), make_turns(sum(LENGTHS), rotated)
    fast = make_cache(NUM_BLOCKS, value_dim=value_dim, dtype=dtype, block=block)
    slow = make_cache(NUM_BLOCKS, value_dim=value_dim, dtype=dtype, block=block)
    got = attend(whole(ROWS, fast), 0, qkv, *rotary, AttentionParams(0.3, window, cap))
    wanted = attend_reference(whole(ROWS, slow), 0, qkv, *rotary, AttentionParams(0.3, window, cap))
    is_exact = dtype == torch.float32
    torch.testing.assert_close(got, wanted, atol=2e-6 if is_exact else 5e-4, rtol=1e-5)
    for mine, twin in zip((*fast.keys, *fast.values), (*slow.keys, *slow.values), strict=True):
        gap = 1e-6 if is_exact else 1e-3
        torch.testing.assert_close(mine, twin, equal_nan=True, atol=gap, rtol=gap)


@pytest.mark.parametrize("window", [0, 11, 300])
@pytest.mark.parametrize("block", [BLOCK, WHOLE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_alone_in_chunks_and_in_a_batch_are_bit_equal(window: int, dtype: torch.dtype, block: int) -> None:
    """A token's attention is the same to the last bit alone, among others, and in prompt chunks of any size."""
    qkv, (cos, sin), params = make_qkv(sum(LENGTHS)), make_turns(sum(LENGTHS), 16), AttentionParams(0.3, window)
    together = attend(whole(ROWS, make_cache(NUM_BLOCKS, dtype=dtype, block=block)), 0, qkv, cos, sin, params)
    first = 0
    for row, length in zip(ROWS, LENGTHS, strict=True):
        for size in (1, 3, 64) if length < 100 else (17, 256):
            cache, parts = make_cache(NUM_BLOCKS, dtype=dtype, block=block), []
            for start in range(0, length, size):
                chunk = slice(first + start, first + min(start + size, length))
                alone = Row([0] * (chunk.stop - chunk.start), start, row.blocks)
                parts.append(attend(whole([alone], cache, 1), 0, qkv[chunk], cos[chunk], sin[chunk], params))
            assert torch.equal(torch.cat(parts), together[first : first + length])
        first += length


def test_scattered_blocks_do_not_matter() -> None:
    """Where a sequence's blocks lie changes nothing."""
    qkv, rotary = make_qkv(37), make_turns(37, 0)
    near = attend(whole([Row([0] * 37, 0, [0, 1, 2, 3, 4])], make_cache()), 0, qkv, *rotary, AttentionParams(0.3))
    far = attend(whole([Row([0] * 37, 0, [20, 3, 11, 0, 7])], make_cache()), 0, qkv, *rotary, AttentionParams(0.3))
    assert torch.equal(near, far)


def test_every_tile_is_dealt_once() -> None:
    """Whatever the number of threads, each query of each kv head is computed exactly once."""
    for threads in (1, 2, 3, 7):
        batch = whole(ROWS, make_cache(NUM_BLOCKS), threads)
        seen = sorted((int(tile[1]), int(tile[2]) + i) for tile in batch.layout.tiles for i in range(tile[3]))
        assert seen == [(head, token) for head in range(2) for token in range(sum(LENGTHS))]
        bounds = batch.layout.bounds
        assert bounds[0] == 0 and bounds[-1] == len(batch.layout.tiles) and len(bounds) == threads + 1


@pytest.mark.parametrize("value_dims", [(16, 16), (16, 24)])
def test_a_block_is_copied_in_all_layers(value_dims: tuple[int, int]) -> None:
    """Keys and values of a block come along in every layer, whether layers are alike or not, and of no other block."""
    shapes = [KVShape(2, 16, value_dim) for value_dim in value_dims]
    cache = KVCache(shapes, 3, BLOCK, CpuBackend("fp32"))
    for number, tensor in enumerate((*cache.keys, *cache.values)):
        tensor[:] = torch.arange(3.0).view(3, 1, 1, 1) + 10 * number
    cache.copy(2, 0)
    for number, tensor in enumerate((*cache.keys, *cache.values)):
        assert tensor[:, 0, 0, 0].tolist() == [10 * number + 2, 10 * number + 1, 10 * number + 2]
