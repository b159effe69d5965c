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
    """What stands in it for a method, and for the base before any."""

    title: str
    show: Callable[[MethodOutcome], str]
    base: str = NOTHING


def markdown(comparison: Comparison) -> str:
    """All of it."""
    parts = ["# Methods compared", f"    {comparison.command}", f"On {comparison.machine}."]
    if comparison.outcomes:
        parts += ["## What training takes", _methods(comparison.outcomes, OF_TRAINING)]
        parts += [
            "## What comes of it",
            _methods(comparison.outcomes, [*_of_quality(comparison.outcomes[0]), *OF_SERVING]),
        ]
        parts += [_how(comparison.server)]
    parts += [f"* `{method}` failed: {reason}" for method, reason in comparison.failed.items()]
    parts += [f"* `{one.method}` is not served: {one.not_served}" for one in comparison.outcomes if one.not_served]
    if found := claims(comparison):
        parts += ["## What is claimed for PEFT", _table(["claim", "measured", ""], found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _how(server: ServerFigures | None) -> str:
    if server is None:
        return ""
    return (
        f"Decode speed: {server.num_requests} requests at once that wear the adapter, {server.num_tokens} tokens each, "
        f"of the base's {server.base_tokens_per_second:,.0f} tokens/s in the same server before and after it; "
        f"the median of {server.num_rounds} rounds."
    )


def _methods(outcomes: Sequence[MethodOutcome], columns: Sequence[Column]) -> str:
    """A row a method, below the base's where it has one."""
    rows = [[f"`{one.method}`", *(column.show(one) for column in columns)] for one in outcomes]
    base = ["the base", *(column.base for column in columns)]
    has_base = any(column.base != NOTHING for column in columns)
    return _table(["", *(column.title for column in columns)], [base, *rows] if has_base else rows)


def _of_quality(first: MethodOutcome) -> list[Column]:
    """The scores that fit the task, and forgetting."""
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


OF_TRAINING = (
    Column("trained parameters", lambda one: f"{one.trained_parameters:,} ({one.trained_share:.3%})"),
    Column("artifact", lambda one: megabytes(one.artifact_bytes)),
    Column("peak memory above the base", lambda one: megabytes(one.memory_bytes)),
    Column("steps, seconds", lambda one: f"{one.steps}, {one.seconds:.0f}"),
    Column("training tokens/s", lambda one: f"{one.tokens_per_second:,.0f}"),
)
OF_SERVING = (
    Column("decode speed", _served(lambda serving: f"{serving.share_of_base:.0%}"), "100%"),
    Column("upload", _served(lambda serving: f"{1000 * serving.load_seconds:.0f} ms")),
    Column("on the device", _served(lambda serving: megabytes(serving.slot_bytes))),
)
