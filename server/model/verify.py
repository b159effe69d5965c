"""Check a loaded base against transformers' own forward."""

from __future__ import annotations

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
Forward = Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # as `forward`, of one model
# Of the largest logit's magnitude, by what keys and values are kept in and what is computed in.
REFERENCE_TOLERANCE = {
    StorageDtypes(torch.float32, torch.float32): 1e-3,
    StorageDtypes(torch.float16, torch.float32): 5e-3,
    StorageDtypes(torch.float16, torch.float16): 5e-2,
    StorageDtypes(torch.bfloat16, torch.bfloat16): 1e-1,
}


class ReferenceCheck:
    """Answers of the stock model to two short sequences, taken before it is instrumented."""

    def __init__(self, model: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        vocab_size = model.config.get_text_config().vocab_size
        self.tokens = torch.randint(0, vocab_size, (2, REFERENCE_TOKENS), generator=generator).to(model.device)
        self.logits = torch.cat([model(input_ids=row[None], use_cache=False).logits[0].float() for row in self.tokens])

    def run(self, compute: Forward, paged: Any) -> Tensor:
        """Both sequences in one batch: the logits of every token."""
        device = self.tokens.device
        positions = torch.arange(REFERENCE_TOKENS, device=device).repeat(2)
        return compute(self.tokens.flatten(), positions, torch.arange(2 * REFERENCE_TOKENS, device=device), paged)

    def paged(self, cache: KVCache) -> PagedBatch:
        """Lay both sequences out as a batch, each in a block of its own."""
        rows = [Row(row.tolist(), 0, [index]) for index, row in enumerate(self.tokens)]
        return page(rows, cache, torch.get_num_threads())

    def compare(self, logits: Tensor, architecture: str, dtypes: StorageDtypes) -> None:
        """Raise `UnsupportedBaseError` if the logits are not those of the stock model."""
        gap = ((logits - self.logits).abs().max() / self.logits.abs().max()).item()
        if not gap <= REFERENCE_TOLERANCE[dtypes]:
            raise UnsupportedBaseError(
                f"{architecture} computes other logits in this server than in transformers "
                f"(largest relative gap {gap:.2g}): it does something that is not passed to the attention interface"
            )
