"""Rows as tensors, and the forward pass that computes the head at label positions alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from training.data.dataset import TokenizedRow

# Rows of a product, at least: with fewer, a thread gets so few that MKL sums them in another order than among more rows
# (measured on two threads: below 12), and a job would not end alone as it does beside others.
MIN_ROWS = 16


@dataclass(frozen=True)
class Batch:
    """Rows as tensors: `ids`, `attention` and `labels` [rows, length], and `targets` [num_labels].

    `labels` marks the positions that predict a completion token; `targets` are those tokens, row by row.
    """

    ids: Tensor
    attention: Tensor
    labels: Tensor
    targets: Tensor


def make_batch(rows: Sequence[TokenizedRow], device: torch.device) -> Batch:
    """Pad on the right with token 0: the attention mask, never an id, says what is padding.

    There are `MIN_ROWS` positions or more.
    """
    length = max(*(len(row.ids) for row in rows), math.ceil(MIN_ROWS / len(rows)))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention, labels = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        attention[i, : len(row.ids)] = 1
        labels[i, row.num_prompt - 1 : len(row.ids) - 1] = True
    targets = torch.tensor([token for row in rows for token in row.completion])
    return Batch(ids.to(device), attention.to(device), labels.to(device), targets.to(device))


def label_logits(model: Any, batch: Batch) -> Tensor:
    """Return logits [num_labels, vocabulary]: the head, costly in a small base, sees the label positions alone."""
    with cut_before_head(model, batch.labels):
        logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits
    return logits[: len(batch.targets)].float()


def forward(
    model: Any, rows: Sequence[TokenizedRow], size: int, on_rows: Callable[[int], None]
) -> Iterator[tuple[Sequence[TokenizedRow], Tensor, Tensor]]:
    """Iterate over batches of at most `size` rows of like length, shortest first.

    Gives the rows, their logits [num_labels, vocabulary] and the target tokens [num_labels]; `on_rows` gets the number
    of rows of each batch that is done.
    """
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for part in (ordered[i : i + size] for i in range(0, len(ordered), size)):
        batch = make_batch(part, next(model.parameters()).device)
        yield part, label_logits(model, batch), batch.targets
        on_rows(len(part))


@contextmanager
def cut_before_head(model: Any, labels: Tensor) -> Iterator[None]:
    """Cut hidden states [rows, virtual + length, d] to [num_labels, d] on their way into the head.

    If those are fewer than `MIN_ROWS`, rows of zeros follow them.

    A hook, and not `model.model`: it holds for every architecture, and what comes after the head (caps, scales) stays.
    """

    def cut(_head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        cut = hidden[:, hidden.shape[1] - labels.shape[1] :][labels]
        return (pad(cut, (0, 0, 0, max(0, MIN_ROWS - len(cut)))), *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()
