"""Labels: completions that are few enough for an answer to be a choice among them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, tensor

from training.data.dataset import TokenizedRow

MAX_CHOICES = 256  # distinct completions up to which a data set is taken for a choice among labels


class Choices:
    """Completions as a prefix tree: which tokens may follow the beginning of one."""

    def __init__(self, completions: Sequence[tuple[int, ...]]) -> None:
        self.completions = frozenset(completions)
        following: dict[tuple[int, ...], set[int]] = {}
        for completion in completions:
            for i, token in enumerate(completion):
                following.setdefault(completion[:i], set()).add(token)
        self._next: dict[tuple[int, ...], Tensor] = {
            prefix: tensor(sorted(tokens)) for prefix, tokens in following.items()
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choices) and other.completions == self.completions

    def __hash__(self) -> int:
        return hash(self.completions)

    def best(self, logits: Tensor, prefix: tuple[int, ...]) -> int:
        """Return the token with the best of `logits` [vocabulary] of those that may follow `prefix`; -1 if none may."""
        allowed = self._next.get(prefix)
        return -1 if allowed is None else int(allowed[logits[allowed.to(logits.device)].argmax()])


def choices_of(rows: Sequence[TokenizedRow]) -> Choices | None:
    """Return the labels in training rows, or None if the answers are too many to be labels, or all differ."""
    distinct = sorted({row.completion for row in rows})
    return Choices(distinct) if len(distinct) <= min(MAX_CHOICES, len(rows) // 2) else None


def is_chosen(row: TokenizedRow, logits: Tensor, choices: Choices) -> bool:
    """Tell whether greedy choices by `logits` [completion tokens, vocabulary] give the row's completion."""
    return all(choices.best(logits[i], row.completion[:i]) == token for i, token in enumerate(row.completion))
