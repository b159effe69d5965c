"""Context of one step, from its begin to its end: set and cleared in one place, the runner."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.model.attention.paged_batch import PagedBatch
from server.model.backends.base import Prepared
from server.model.row_adapters import Acts, RowAdapters


@dataclass
class StepContext:
    """The adapters and the KV cache of one step's rows.

    `tokens` has the adapters of all T tokens, `sampled` of the R that the head sees; `of_tokens` and `of_sampled`
    are the same as the backend prepared them. `paged` also reaches attention as an argument, for transformers' modules
    hand it on.
    """

    tokens: RowAdapters
    sampled: RowAdapters
    acts: Acts
    of_tokens: Prepared
    of_sampled: Prepared
    virtual: list[tuple[int, int, int, int]] = field(default_factory=list)  # slot, first embedding, count, first token
    paged: PagedBatch | None = None
    stream: Tensor = field(default_factory=lambda: torch.empty(0))  # of the layer that is computed, if one reads it
