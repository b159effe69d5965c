"""How well a model answers: most of it from one teacher-forced forward pass over the evaluation rows.

A greedy answer equals the reference exactly when the reference's token is the argmax at every position after the
reference's own tokens: so no generation is needed for exact match. Only where answers are texts, of which few are equal
and many are good, are some written out and compared.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from training.base import Base
from training.data.batch import label_logits, make_batch
from training.data.dataset import TokenizedRow, TrainingData
from training.evaluation.generate import Prompt, answer
from training.evaluation.text_metrics import bleu, rouge_l

NEUTRAL = Path(__file__).parent / "neutral" / "text.txt"
NEUTRAL_WINDOW, NEUTRAL_BATCH = 256, 4  # tokens, and windows at a time: every position of them needs the head
EVAL_BATCH = 16
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]  # title, rows -> how many more are done
MAX_CHOICES = 256  # distinct completions up to which a data set is taken for a choice among labels


@dataclass(frozen=True)
class Scores:
    """What a manifest says of a model, base or adapter.

    `exact_match`: share of rows whose free greedy answer is the reference, to its end.
    `label_accuracy`: the same when each token is chosen among those that continue some label of the training rows (a
    greedy choice by the labels' logits, as `response_format: choice` does); None where answers are no labels.
    `perplexity`: of the completions' tokens, EOS included.
    `rouge_l` [0, 1] and `bleu` [0, 100]: of the greedy answers to `num_answers` prompts; None where none were written.
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


@dataclass(frozen=True)
class Suite:
    """What models are scored on. `asked` are the prompts that answers are written to, with their references."""

    rows: Sequence[TokenizedRow]
    choices: Choices | None
    asked: Mapping[Prompt, list[str]]
    max_tokens: int
    neutral: Sequence[TokenizedRow]
    tokenizer: Any

    @property
    def size(self) -> int:
        """How many rows a scoring tells that it has done."""
        return len(self.rows) + len(self.asked) + len(self.neutral)


class Choices:
    """The known completions as a prefix tree: which tokens may follow a beginning of one."""

    def __init__(self, completions: Sequence[tuple[int, ...]]) -> None:
        self.completions = frozenset(completions)
        following: dict[tuple[int, ...], set[int]] = {}
        for completion in completions:
            for i, token in enumerate(completion):
                following.setdefault(completion[:i], set()).add(token)
        self._next: dict[tuple[int, ...], Tensor] = {
            prefix: torch.tensor(sorted(tokens)) for prefix, tokens in following.items()
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choices) and other.completions == self.completions

    def __hash__(self) -> int:
        return hash(self.completions)

    def best(self, logits: Tensor, prefix: tuple[int, ...]) -> int:
        """The token with the best of `logits` [vocabulary] among those that may follow `prefix`; -1 if none may."""
        allowed = self._next.get(prefix)
        return -1 if allowed is None else int(allowed[logits[allowed.to(logits.device)].argmax()])


def choices_of(rows: Sequence[TokenizedRow]) -> Choices | None:
    """The labels in training rows, or None when the answers are too many to be labels, or all differ."""
    distinct = sorted({row.completion for row in rows})
    return Choices(distinct) if len(distinct) <= min(MAX_CHOICES, len(rows) // 2) else None


def suite_of(rows: TrainingData, base: Base, num_answers: int) -> Suite:
    """What fits the data: labels are compared by their logits, texts are written out for at most `num_answers`."""
    choices = choices_of(rows.train_rows)
    references: dict[Prompt, list[str]] = {}
    for row in rows.held_rows:
        text = base.tokenizer.decode(row.completion[:-1]).strip()
        references.setdefault(row.ids[: row.num_prompt], []).append(text)
    count = 0 if choices is not None else min(num_answers, len(references))
    picked = random.Random(0).sample(sorted(references), count)  # noqa: S311 - the same ones for every model
    return Suite(
        rows.held_rows,
        choices,
        {prompt: references[prompt] for prompt in picked},
        max((len(row.completion) for row in rows.held_rows), default=1),
        _neutral(base),
        base.tokenizer,
    )


def _neutral(base: Base) -> list[TokenizedRow]:
    """The neutral text in windows; the first token of each predicts and is not predicted."""
    ids = base.tokenizer(NEUTRAL.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    size = min(NEUTRAL_WINDOW, base.spec.max_positions // 2)  # a soft prompt has positions, too
    windows = [tuple(ids[i : i + size]) for i in range(0, len(ids), size)]
    return [TokenizedRow(window, 1, 0) for window in windows if len(window) > 1]


def score(model: Any, suite: Suite, bar: Bar, title: str) -> Scores:
    """Score a model behind a bar over the suite's rows."""
    with bar(title, suite.size) as more:
        return evaluate(model, suite, more)


@torch.inference_mode()
def evaluate(model: Any, suite: Suite, on_rows: Callable[[int], None] = lambda _num: None) -> Scores:
    """Score `model`; `on_rows` hears how many more rows are done."""
    model.eval()
    num_exact, num_chosen, loss, num_tokens = 0, 0, 0.0, 0
    for part, logits, targets in _forward(model, suite.rows, EVAL_BATCH, on_rows):
        loss += cross_entropy(logits, targets, reduction="sum").item()
        num_tokens += len(targets)
        for row, own in zip(part, logits.split([len(row.completion) for row in part]), strict=True):
            num_exact += tuple(own.argmax(-1).tolist()) == row.completion
            num_chosen += suite.choices is not None and _is_chosen(row, own, suite.choices)
    num_rows = len(suite.rows)
    likeness = _likeness(model, suite, on_rows)
    return Scores(
        num_rows=num_rows,
        exact_match=num_exact / num_rows,
        label_accuracy=None if suite.choices is None else num_chosen / num_rows,
        perplexity=_perplexity(loss, num_tokens),
        num_answers=len(suite.asked),
        rouge_l=likeness[0],
        bleu=likeness[1],
        neutral_perplexity=_neutral_perplexity(model, suite.neutral, on_rows),
    )


def _forward(
    model: Any, rows: Sequence[TokenizedRow], size: int, on_rows: Callable[[int], None]
) -> Iterator[tuple[Sequence[TokenizedRow], Tensor, Tensor]]:
    """Rows of like length with the logits of their label positions and the tokens that are right there."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for part in (ordered[i : i + size] for i in range(0, len(ordered), size)):
        batch = make_batch(part, next(model.parameters()).device)
        yield part, label_logits(model, batch), batch.targets
        on_rows(len(part))


def _likeness(model: Any, suite: Suite, on_rows: Callable[[int], None]) -> tuple[float, float] | tuple[None, None]:
    """ROUGE-L and BLEU of the answers that are asked for."""
    if not suite.asked:
        return None, None
    answers = answer(model, list(suite.asked), suite.tokenizer.eos_token_id, suite.max_tokens, on_rows)
    texts = [suite.tokenizer.decode(answers[prompt]).strip() for prompt in suite.asked]
    references = list(suite.asked.values())
    return rouge_l(texts, references), bleu(texts, references)


def _neutral_perplexity(model: Any, windows: Sequence[TokenizedRow], on_rows: Callable[[int], None]) -> float:
    losses = [
        cross_entropy(logits, targets, reduction="sum").item()
        for _part, logits, targets in _forward(model, windows, NEUTRAL_BATCH, on_rows)
    ]
    return _perplexity(sum(losses), sum(len(window.completion) for window in windows))


def _perplexity(loss: float, num_tokens: int) -> float:
    return math.exp(min(loss / num_tokens, 700.0))


def _is_chosen(row: TokenizedRow, logits: Tensor, choices: Choices) -> bool:
    return all(choices.best(logits[i], row.completion[:i]) == token for i, token in enumerate(row.completion))
