"""Claims usually made for PEFT, each beside the figures that were measured, for or against it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from training.compare.results import FULL, Comparison, MethodOutcome
from training.compare.scores import forgotten, quality, scores_of

MAX_SHARE = 0.01  # of the base's parameters: the limit of "a small share"
MEGA = 1e6
MAX_BYTES = 10 * MEGA  # of an artifact: the limit of "megabytes per task"
NEAR = 0.01  # of quality: how far below full fine-tuning is still "as good"

Value = Callable[[MethodOutcome], float | None]


class Claim(NamedTuple):
    """A claim with its figures; the verdict is `holds`, the methods that it fails for, or why it was not measured."""

    claim: str
    figures: str
    verdict: str


def claims(comparison: Comparison) -> list[Claim]:
    """Check every claim against a comparison; without adapters there is none."""
    adapters, full = [outcome for outcome in comparison.outcomes if outcome.is_peft], comparison.of(FULL)
    if not adapters:
        return []
    return [
        _share(adapters),
        _bytes(adapters, full),
        _memory(adapters, full),
        _forgetting(adapters, full),
        _quality(adapters, full),
    ]


def _share(adapters: list[MethodOutcome]) -> Claim:
    figures = _range(adapters, lambda outcome: outcome.trained_share, lambda value: f"{value:.3%}")
    bad = [outcome.method for outcome in adapters if outcome.trained_share > MAX_SHARE]
    return Claim(f"a small share of the parameters (at most {MAX_SHARE:.0%})", figures, _verdict(bad))


def megabytes(num_bytes: float) -> str:
    """Write a number of bytes as megabytes."""
    return f"{num_bytes / MEGA:,.2f} MB" if num_bytes < 100 * MEGA else f"{num_bytes / MEGA:,.0f} MB"


def _bytes(adapters: list[MethodOutcome], full: MethodOutcome | None) -> Claim:
    figures = _range(adapters, lambda outcome: outcome.artifact_bytes, megabytes)
    suffix = f"; full: {megabytes(full.artifact_bytes)}" if full else ""
    bad = [outcome.method for outcome in adapters if outcome.artifact_bytes > MAX_BYTES]
    return Claim(f"megabytes per task (at most {MAX_BYTES / MEGA:.0f})", figures + suffix, _verdict(bad))


def _memory(adapters: list[MethodOutcome], full: MethodOutcome | None) -> Claim:
    claim = "less memory to train than full fine-tuning"
    if full is None:
        return _without_full(claim)
    full_bytes = full.memory_bytes
    if not full_bytes:  # a base so small that no page was added
        return Claim(claim, "full fine-tuning took no memory that could be measured", "not measured")
    figures = _range(adapters, lambda outcome: outcome.memory_bytes / full_bytes, lambda value: f"{value:.2f}")
    bad = [outcome.method for outcome in adapters if outcome.memory_bytes >= full_bytes]
    return Claim(claim, f"{figures} of its {megabytes(full_bytes)} above the loaded base", _verdict(bad))


def _forgetting(adapters: list[MethodOutcome], full: MethodOutcome | None) -> Claim:
    claim = "less forgetting than full fine-tuning"
    if full is None:
        return _without_full(claim)
    bound, measured = forgotten(full), [outcome for outcome in adapters if forgotten(outcome) is not None]
    if bound is None or not measured:
        return Claim(claim, "", "not measured")
    figures = _range(measured, forgotten, lambda value: f"{value:+.2%}")
    bad = [outcome.method for outcome in measured if (forgotten(outcome) or 0.0) >= bound]
    return Claim(claim, f"perplexity of a neutral text: {figures}; full: {bound:+.2%}", _verdict(bad))


def _quality(adapters: list[MethodOutcome], full: MethodOutcome | None) -> Claim:
    claim = f"as good as full fine-tuning in the same budget (within {NEAR * 100:.0f} point)"
    if full is None:
        return _without_full(claim)
    score = scores_of(full)[0]
    figures = _range(adapters, quality, score.show)
    bad = [outcome.method for outcome in adapters if quality(outcome) < quality(full) - NEAR]
    return Claim(claim, f"{score.name}: {figures}; full: {score.show(quality(full))}", _verdict(bad))


def _without_full(claim: str) -> Claim:
    return Claim(claim, "", f"not measured: {FULL} was not trained")


def _range(adapters: list[MethodOutcome], value: Value, show: Callable[[float], str]) -> str:
    """Write the least and the most of a value, each with its method."""
    figures = sorted((value(outcome) or 0.0, outcome.method) for outcome in adapters)
    ends = [f"{show(figure)} ({method})" for figure, method in (figures[0], figures[-1])]
    return " to ".join(ends if len(figures) > 1 else ends[:1])


def _verdict(bad: list[str]) -> str:
    return f"not for {', '.join(bad)}" if bad else "holds"
