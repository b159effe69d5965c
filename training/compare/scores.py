"""The score that says how good answers are: exact match if they are labels, BLEU if they are texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from training.compare.results import MethodOutcome

NEUTRAL = "neutral_perplexity"


class Score(NamedTuple):
    """A score of a manifest: its name for people, its key, and the best value that it can have."""

    name: str
    key: str
    best: float = 1.0

    def of(self, scores: Mapping[str, Any]) -> float:
        """Return the score's value as a share of the best, from 0 to 1."""
        return float(scores[self.key]) / self.best

    def show(self, value: float) -> str:
        """Write a value from 0 to 1 as the score is usually written."""
        return f"{value:.1%}" if self.best == 1.0 else f"{value * self.best:.1f}"


EXACT, LABELS, BLEU = (
    Score("exact match", "exact_match"),
    Score("label accuracy", "label_accuracy"),
    Score("BLEU", "bleu", 100),
)


def scores_of(outcome: MethodOutcome) -> list[Score]:
    """Return the scores that fit the task; the first one says how good a method is."""
    if outcome.after.get(LABELS.key) is not None:
        return [EXACT, LABELS]
    return [BLEU, EXACT] if outcome.after.get(BLEU.key) is not None else [EXACT]


def quality(outcome: MethodOutcome) -> float:
    """Return the quality of the answers with the adapter, from 0 to 1."""
    return scores_of(outcome)[0].of(outcome.after)


def forgotten(outcome: MethodOutcome) -> float | None:
    """Return by which share the perplexity of a neutral text rose (0.1 is a tenth more); None if it was not taken."""
    before, after = outcome.before.get(NEUTRAL), outcome.after.get(NEUTRAL)
    return None if before is None or after is None else after / before - 1.0
