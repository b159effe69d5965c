"""How well a model answers, from one teacher-forced forward pass over the evaluation rows.

A greedy answer equals the reference exactly when the reference's token is the argmax at every position after the
reference's own tokens: so no generation is needed for exact match.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from adapters_store.artifact import ParityCase
from training.batch import label_logits, make_batch
from training.data import Row

MAX_CHOICES = 256  # distinct completions up to which a data set is taken for a choice among labels
PARITY_CASES, PARITY_TOP, PARITY_TOKENS = 8, 20, 16


@dataclass(frozen=True)
class Scores:
    """`exact_match`: share of rows whose free greedy answer is the reference, to its end.

    `choice_match`: the same when each token is chosen among those that continue some known label (a greedy choice by
    the labels' logits, as `response_format: choice` does); None where answers are not labels. `perplexity`: of the
    completion's tokens, EOS included.
    """

    num_rows: int
    exact_match: float
    choice_match: float | None
    perplexity: float


class Choices:
    """The known completions as a prefix tree: which tokens may follow a beginning of one."""

    def __init__(self, completions: Sequence[tuple[int, ...]]) -> None:
        following: dict[tuple[int, ...], set[int]] = {}
        for completion in completions:
            for i, token in enumerate(completion):
                following.setdefault(completion[:i], set()).add(token)
        self._next: dict[tuple[int, ...], Tensor] = {
            prefix: torch.tensor(sorted(tokens)) for prefix, tokens in following.items()
        }

    def best(self, logits: Tensor, prefix: tuple[int, ...]) -> int:
        """The token with the best of `logits` [vocabulary] among those that may follow `prefix`."""
        allowed = self._next[prefix]
        return int(allowed[logits[allowed.to(logits.device)].argmax()])


def choices_of(*sets: Sequence[Row]) -> Choices | None:
    """The labels of the data sets, or None when the answers are too many to be labels, or all differ."""
    completions = [row.completion for rows in sets for row in rows]
    distinct = sorted(set(completions))
    return Choices(distinct) if len(distinct) <= min(MAX_CHOICES, len(completions) // 2) else None


@torch.inference_mode()
def evaluate(
    model: Any,
    rows: Sequence[Row],
    choices: Choices | None,
    batch_size: int = 16,
    on_rows: Callable[[int], None] = lambda _num: None,
) -> Scores:
    """Score `model` on `rows`; `on_rows` hears how many more are done."""
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row.ids))
    num_exact, num_chosen, loss, num_tokens = 0, 0, 0.0, 0
    for i in range(0, len(ordered), batch_size):
        part = ordered[i : i + batch_size]
        batch = make_batch(part, next(model.parameters()).device)
        logits = label_logits(model, batch)
        loss += cross_entropy(logits, batch.targets, reduction="sum").item()
        num_tokens += len(batch.targets)
        for row, own in zip(part, logits.split([len(row.completion) for row in part]), strict=True):
            num_exact += tuple(own.argmax(-1).tolist()) == row.completion
            num_chosen += choices is not None and _is_chosen(row, own, choices)
        on_rows(len(part))
    choice_match = None if choices is None else num_chosen / len(rows)
    return Scores(len(rows), num_exact / len(rows), choice_match, math.exp(min(loss / num_tokens, 700.0)))


def _is_chosen(row: Row, logits: Tensor, choices: Choices) -> bool:
    return all(choices.best(logits[i], row.completion[:i]) == token for i, token in enumerate(row.completion))


@torch.inference_mode()
def parity(model: Any, held: Sequence[Row], train: Sequence[Row], eos_token_id: int) -> list[ParityCase]:
    """What this very model answers to a few prompts, for a server to prove that it serves the same.

    The prompts differ and are spread over the lengths in `held`, or where those are too few in both sets. Each token is
    computed without a cache. EOS ends a continuation.
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
        open_cases = [case for case in cases if eos_token_id not in case.continuation]
        for case, logits in zip(open_cases, _next_logits(model, open_cases), strict=True):
            if not case.top:
                best = logits.topk(min(PARITY_TOP, len(logits)))
                case.top += [(int(i), round(float(v), 5)) for v, i in zip(best.values, best.indices, strict=True)]
            case.continuation.append(int(logits.argmax()))
    return cases


def _next_logits(model: Any, cases: Sequence[ParityCase]) -> Sequence[Tensor]:
    """Of the token after what each case has so far."""
    if not cases:
        return []
    known = [(*case.prompt_token_ids, *case.continuation) for case in cases]
    rows = [Row((*ids, 0), len(ids), 0) for ids in known]  # a token that nobody asks about, for there must be one
    return list(label_logits(model, make_batch(rows, next(model.parameters()).device)))
