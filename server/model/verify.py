"""Check a loaded base against transformers' own forward."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from server.core import Row
from server.model.attention.kv_cache import KVCache
from server.model.attention.paged_batch import PagedBatch, page
from server.model.errors import UnsupportedBaseError
from server.model.precision import StorageDtypes

REFERENCE_TOKENS = 24
BORDER = re.compile(r"position_embeddings|window|chunk|seq_len|max_length|n_positions|original_max")
Forward = Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # as `forward`, of one model
# Of the largest logit's magnitude, by what keys and values are kept in and what is computed in.
REFERENCE_TOLERANCE = {
    StorageDtypes(torch.float32, torch.float32): 1e-3,
    StorageDtypes(torch.float16, torch.float32): 5e-3,
    StorageDtypes(torch.float16, torch.float16): 5e-2,
    StorageDtypes(torch.bfloat16, torch.bfloat16): 1e-1,
}


def starts_at_borders(config: dict[str, Any], max_tokens: int) -> list[int]:
    """Return positions from which a reference row crosses each border that a config names, or ends at the last one."""
    before, last = REFERENCE_TOKENS // 2, max(0, max_tokens - REFERENCE_TOKENS)
    return sorted({max(0, min(border - before, last)) for border in (*_borders(config), max_tokens)})


def _borders(config: dict[str, Any]) -> set[int]:
    """Return the numbers of positions that a config names, at any depth: context lengths, windows, chunks."""
    found = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _borders(value)
        elif isinstance(value, int) and value > 0 and BORDER.search(key):
            found.add(value)
    return found


class ReferenceCheck:
    """Answers of the stock model to two short sequences, taken before it is instrumented."""

    def __init__(self, model: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        vocab_size = model.config.get_text_config().vocab_size
        self.tokens = torch.randint(0, vocab_size, (2, REFERENCE_TOKENS), generator=generator).to(model.device)
        self.logits = torch.cat([model(input_ids=row[None], use_cache=False).logits[0].float() for row in self.tokens])

    def run(self, compute: Forward, paged: Any, second_start: int = 0) -> Tensor:
        """Both sequences in one batch: the logits of every token. The second's positions may start elsewhere."""
        device = self.tokens.device
        own = torch.arange(REFERENCE_TOKENS, device=device)
        positions, wanted = torch.cat([own, own + second_start]), torch.arange(2 * REFERENCE_TOKENS, device=device)
        return compute(self.tokens.flatten(), positions, wanted, paged)

    def paged(self, cache: KVCache) -> PagedBatch:
        """Lay both sequences out as a batch, each in a block of its own."""
        rows = [Row(row.tolist(), 0, [index]) for index, row in enumerate(self.tokens)]
        return page(rows, cache, torch.get_num_threads())

    def check_apart(self, compute: Forward, paged: Any, logits: Tensor, starts: list[int], architecture: str) -> None:
        """Raise `UnsupportedBaseError` if the first row's logits change with positions of the second, now or later.

        `logits` are those of both rows from position 0; then the second begins at each of `starts`, and at 0 again.
        """
        for start in (*starts, 0):
            if not torch.equal(self.run(compute, paged, start)[:REFERENCE_TOKENS], logits[:REFERENCE_TOKENS]):
                raise UnsupportedBaseError(
                    f"{architecture} computes a sequence otherwise beside or after one that reaches position "
                    f"{max(starts) + REFERENCE_TOKENS - 1}: something in it depends on the largest position of a call"
                )

    def compare(self, logits: Tensor, architecture: str, dtypes: StorageDtypes) -> None:
        """Raise `UnsupportedBaseError` if the logits are not those of the stock model."""
        gap = ((logits - self.logits).abs().max() / self.logits.abs().max()).item()
        if not gap <= REFERENCE_TOLERANCE[dtypes]:
            raise UnsupportedBaseError(
                f"{architecture} computes other logits in this server than in transformers "
                f"(largest relative gap {gap:.2g}): it does something that is not passed to the attention interface"
            )
