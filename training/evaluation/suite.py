"""A suite: rows, prompts and a neutral text on which a base and its adapters are scored alike."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.base import Base
from training.data.dataset import TokenizedRow, TrainingData
from training.evaluation.choices import Choices, choices_of
from training.evaluation.generate import Prompt

NEUTRAL = Path(__file__).parent / "neutral" / "text.txt"
NEUTRAL_WINDOW = 256  # tokens


@dataclass(frozen=True)
class Suite:
    """The rows and prompts that models are scored on, the same for a base and its adapters.

    `choices` are the labels, if answers are labels; `asked` are the prompts that answers of at most `max_tokens` are
    written to, with their references, up to a token of `ends`; `neutral` is a text that has nothing to do with the
    task, in windows.
    """

    rows: Sequence[TokenizedRow]
    choices: Choices | None
    asked: Mapping[Prompt, list[str]]
    max_tokens: int
    neutral: Sequence[TokenizedRow]
    tokenizer: Any
    ends: frozenset[int]

    @property
    def size(self) -> int:
        """Number of rows that a scoring counts on its bar."""
        return len(self.rows) + len(self.asked) + len(self.neutral)


def suite_of(rows: TrainingData, base: Base, num_answers: int) -> Suite:
    """Choose what fits the data: labels are compared by their logits, texts are written to `num_answers` prompts."""
    neutral = _neutral(base)
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
        neutral,
        base.tokenizer,
        base.ends,
    )


def _neutral(base: Base) -> list[TokenizedRow]:
    """Return the neutral text in windows; the first token of each is given and not predicted."""
    ids = base.tokenizer(NEUTRAL.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    size = min(NEUTRAL_WINDOW, base.spec.max_positions // 2)  # a soft prompt has positions, too
    windows = [tuple(ids[i : i + size]) for i in range(0, len(ids), size)]
    return [TokenizedRow(window, 1, 0) for window in windows if len(window) > 1]
