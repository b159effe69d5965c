"""Parity cases: prompts with the logits of the trainer's own forward pass, which a server must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapters_store.format.manifest import ParityCase
from training.data.batch import label_logits, make_batch
from training.data.dataset import TokenizedRow

PARITY_CASES, PARITY_TOP, PARITY_TOKENS = 8, 20, 16


@torch.inference_mode()
def parity(
    model: Any, held: Sequence[TokenizedRow], train: Sequence[TokenizedRow], ends: frozenset[int]
) -> list[ParityCase]:
    """Return cases of a few prompts: the top logits of the first token, and the greedy continuation.

    The prompts differ and are spread over the lengths in `held`, or in both sets if those are too few. Each token is
    computed without a cache. A token of `ends` ends a continuation.
    """
    model.eval()
    prompts = {row.ids[: row.num_prompt] for row in held}
    if len(prompts) < PARITY_CASES:
        prompts |= {row.ids[: row.num_prompt] for row in train}
    ordered = sorted(prompts, key=lambda ids: (len(ids), ids))
    count = min(PARITY_CASES, len(ordered))
    picked = [ordered[i * (len(ordered) - 1) // max(1, count - 1)] for i in range(count)]
    cases = [ParityCase(list(ids), [], []) for ids in picked]
    for _ in range(PARITY_TOKENS):
        open_cases = [case for case in cases if ends.isdisjoint(case.continuation)]
        for case, logits in zip(open_cases, _next_logits(model, open_cases), strict=True):
            if not case.top:
                best = logits.topk(min(PARITY_TOP, len(logits)))
                case.top += [(int(i), round(float(v), 5)) for v, i in zip(best.values, best.indices, strict=True)]
            case.continuation.append(int(logits.argmax()))
    return cases


def _next_logits(model: Any, cases: Sequence[ParityCase]) -> Sequence[Tensor]:
    """Return the logits [vocabulary] of each case's next token."""
    if not cases:
        return []
    prefixes = [(*case.prompt_token_ids, *case.continuation) for case in cases]
    rows = [TokenizedRow((*ids, 0), len(ids), 0) for ids in prefixes]  # 0: a row needs a completion of any token
    return list(label_logits(model, make_batch(rows, next(model.parameters()).device)))
