"""Scores of a model's answers, most of them from one teacher-forced forward pass over the evaluation rows.

A greedy answer equals the reference exactly when the reference's token is the argmax at every position after the
reference's own tokens: so no generation is needed for exact match. Answers are generated and compared only if they are
texts, of which few are equal to the reference and many are good.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from training.data.batch import forward
from training.evaluation.choices import is_chosen
from training.evaluation.generate import answer_texts
from training.evaluation.suite import Suite
from training.evaluation.text_metrics import bleu, rouge_l

NEUTRAL_BATCH = 4  # windows at a time: every position of them needs the head
EVAL_BATCH = 16
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]  # title, rows -> how many more are done


@dataclass(frozen=True)
class Scores:
    """Scores of a model, base or adapter, as a manifest has them.

    `exact_match`: share of rows whose free greedy answer is the reference, to its end.
    `label_accuracy`: the same when each token is chosen among those that continue some label of the training rows (a
    greedy choice by the labels' logits, as `response_format: choice` does); None if answers are no labels.
    `perplexity`: of the completions' tokens, EOS included.
    `rouge_l` [0, 1] and `bleu` [0, 100]: of the greedy answers to `num_answers` prompts; None if none were written.
    `neutral_perplexity`: of a text that has nothing to do with the task.
    """

    num_rows: int
    exact_match: float
    label_accuracy: float | None
    perplexity: float
    num_answers: int
    rouge_l: float | None
    bleu: float | None
    neutral_perplexity: float


def score(model: Any, suite: Suite, bar: Bar, title: str) -> Scores:
    """Score a model behind a bar over the suite's rows."""
    with bar(title, suite.size) as more:
        return evaluate(model, suite, more)


@torch.inference_mode()
def evaluate(model: Any, suite: Suite, on_rows: Callable[[int], None] = lambda _num: None) -> Scores:
    """Score `model` on a suite; `on_rows` gets the number of rows that are done more."""
    model.eval()
    neutral_loss, loss, num_neutral, num_tokens = 0.0, 0.0, 0, 0
    for _, logits, targets in forward(model, suite.neutral, NEUTRAL_BATCH, on_rows):
        neutral_loss += cross_entropy(logits, targets, reduction="sum").item()
        num_neutral += len(targets)
    num_exact, num_chosen = 0, 0
    for rows, logits, targets in forward(model, suite.rows, EVAL_BATCH, on_rows):
        loss += cross_entropy(logits, targets, reduction="sum").item()
        num_tokens += len(targets)
        for row, own in zip(rows, logits.split([len(row.completion) for row in rows]), strict=True):
            num_exact += tuple(own.argmax(-1).tolist()) == row.completion
            num_chosen += suite.choices is not None and is_chosen(row, own, suite.choices)
    answers = answer_texts(model, list(suite.asked), suite.tokenizer, suite.ends, suite.max_tokens, on_rows)
    references = list(suite.asked.values())
    num_rows = len(suite.rows)
    return Scores(
        num_rows=num_rows,
        exact_match=num_exact / num_rows,
        label_accuracy=None if suite.choices is None else num_chosen / num_rows,
        perplexity=_perplexity(loss, num_tokens),
        num_answers=len(suite.asked),
        rouge_l=rouge_l(answers, references) if answers else None,
        bleu=bleu(answers, references) if answers else None,
        neutral_perplexity=_perplexity(neutral_loss, num_neutral),
    )


def _perplexity(loss: float, num_tokens: int) -> float:
    """Return e to the mean of `loss`, a sum over tokens, as far as a float goes."""
    return math.exp(min(loss / num_tokens, 700.0))
