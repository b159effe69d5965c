"""A comparison as Markdown: a row a method, what could not be trained or served, and the claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from training.compare.claims import claims, megabytes
from training.compare.results import Comparison, MethodOutcome, ServerFigures, Serving
from training.compare.scores import Score, forgotten, scores_of

NOTHING = "-"


class Column(NamedTuple):
    """A column of a table: how a method's cell is written, and the cell of the base."""

    title: str
    show: Callable[[MethodOutcome], str]
    base: str = NOTHING


def markdown(comparison: Comparison) -> str:
    """Write a comparison as Markdown."""
    parts = ["# Methods compared", f"    {comparison.command}", f"On {comparison.machine}."]
    if comparison.outcomes:
        parts += ["## What training takes", _methods(comparison.outcomes, TRAINING_COLUMNS)]
        parts += [
            "## What comes of it",
            _methods(comparison.outcomes, [*_of_quality(comparison.outcomes[0]), *SERVING_COLUMNS]),
        ]
        parts += [_how(comparison.server)]
    parts += [f"* `{method}` failed: {reason}" for method, reason in comparison.failed.items()]
    parts += [
        f"* `{outcome.method}` is not served: {outcome.not_served}"
        for outcome in comparison.outcomes
        if outcome.not_served
    ]
    if rows := claims(comparison):
        parts += ["## What is claimed for PEFT", _table(["claim", "measured", ""], rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _how(server: ServerFigures | None) -> str:
    if server is None:
        return ""
    return (
        f"Decode speed: {server.num_requests} requests at once that use the adapter, {server.num_tokens} tokens each, "
        f"of the base's {server.base_tokens_per_second:,.0f} tokens/s in the same server before and after it; "
        f"the median of {server.num_rounds} rounds."
    )


def _methods(outcomes: Sequence[MethodOutcome], columns: Sequence[Column]) -> str:
    """Write a row a method, below the base's if any column has a figure of the base."""
    rows = [[f"`{outcome.method}`", *(column.show(outcome) for column in columns)] for outcome in outcomes]
    base = ["the base", *(column.base for column in columns)]
    has_base = any(column.base != NOTHING for column in columns)
    return _table(["", *(column.title for column in columns)], [base, *rows] if has_base else rows)


def _of_quality(first: MethodOutcome) -> list[Column]:
    """Return the columns of the scores that fit the task, and of forgetting."""
    columns = [
        Column(score.name, partial(_score, score), score.show(score.of(first.before))) for score in scores_of(first)
    ]
    return [*columns, Column("perplexity of a neutral text", _forgotten, "+0.00%")]


def _score(score: Score, outcome: MethodOutcome) -> str:
    return score.show(score.of(outcome.after))


def _forgotten(outcome: MethodOutcome) -> str:
    change = forgotten(outcome)
    return NOTHING if change is None else f"{change:+.2%}"


def _served(show: Callable[[Serving], str]) -> Callable[[MethodOutcome], str]:
    return lambda outcome: NOTHING if outcome.serving is None else show(outcome.serving)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


TRAINING_COLUMNS = (
    Column("trained parameters", lambda outcome: f"{outcome.trained_parameters:,} ({outcome.trained_share:.3%})"),
    Column("artifact", lambda outcome: megabytes(outcome.artifact_bytes)),
    Column("peak memory above the base", lambda outcome: megabytes(outcome.memory_bytes)),
    Column("steps, seconds", lambda outcome: f"{outcome.steps}, {outcome.seconds:.0f}"),
    Column("training tokens/s", lambda outcome: f"{outcome.tokens_per_second:,.0f}"),
)
SERVING_COLUMNS = (
    Column("decode speed", _served(lambda serving: f"{serving.share_of_base:.0%}"), "100%"),
    Column("upload", _served(lambda serving: f"{1000 * serving.load_seconds:.0f} ms")),
    Column("on the device", _served(lambda serving: megabytes(serving.slot_bytes))),
)
