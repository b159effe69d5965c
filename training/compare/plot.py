"""A comparison as a PNG: a panel for each trade-off, a bar for each method."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from training.compare.results import Comparison, MethodOutcome
from training.compare.scores import forgotten, quality, scores_of

BAR_INCHES, PANEL_INCHES = 0.34, 4.2
ADAPTER, FULL, LINE = "#1f5fa8", "#d1883c", "#8a8a8a"
MEGA = 1e6


class Panel(NamedTuple):
    """A panel of bars: the value that a bar is as long as, how it is labelled, and the base's value, if it has one."""

    title: str
    value: Callable[[MethodOutcome], float | None]
    show: Callable[[float], str]
    base: float | None = None
    is_log: bool = False


def draw(comparison: Comparison) -> bytes:
    """Draw two rows of panels as a PNG, methods in the given order and full fine-tuning in another colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    outcomes = comparison.outcomes
    height = 2 * (1.1 + BAR_INCHES * len(outcomes))
    figure = Figure(figsize=(3 * PANEL_INCHES, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(2, 3).flat, _panels(outcomes), strict=True):
        _panel(axes, panel, outcomes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panels(outcomes: Sequence[MethodOutcome]) -> list[Panel]:
    first = outcomes[0]
    score = scores_of(first)[0]
    return [
        Panel(
            "trained parameters", lambda outcome: outcome.trained_parameters, lambda value: f"{value:,.0f}", is_log=True
        ),
        Panel(
            "peak memory above the base, MB", lambda outcome: outcome.memory_bytes / MEGA, lambda value: f"{value:,.0f}"
        ),
        Panel("training tokens/s", lambda outcome: outcome.tokens_per_second, lambda value: f"{value:,.0f}"),
        Panel(f"{score.name} after the same budget", quality, score.show, score.of(first.before)),
        Panel(
            "forgetting: perplexity of a neutral text",
            lambda outcome: None if (change := forgotten(outcome)) is None else 1 + change,
            lambda value: f"{value - 1:+.0%}",
            1.0,
            is_log=True,
        ),
        Panel(
            "decode speed when served, of the base's",
            lambda outcome: outcome.serving.share_of_base if outcome.serving else None,
            lambda value: f"{value:.0%}",
            1.0,
        ),
    ]


def _panel(axes: Any, panel: Panel, outcomes: Sequence[MethodOutcome]) -> None:
    """Draw bars from top to bottom, `-` for a missing value, and a dashed line at the base's value."""
    values = [panel.value(outcome) for outcome in outcomes]
    colors = [ADAPTER if outcome.is_peft else FULL for outcome in outcomes]
    begin = panel.base or 0.0 if panel.is_log else 0.0  # a logarithmic axis has no zero: bars begin at the base
    lengths = [0.0 if value is None else value - begin for value in values]
    bars = axes.barh(range(len(outcomes)), lengths, left=begin, color=colors, height=0.72)
    labels = ["-" if value is None else panel.show(value) for value in values]
    clear = {"facecolor": "white", "linewidth": 0, "pad": 0.5}  # over the line
    axes.bar_label(bars, labels, fontsize=8, padding=3, bbox=clear)
    title = panel.title
    if panel.base is not None:
        axes.axvline(panel.base, color=LINE, linestyle="--", linewidth=1.0, zorder=0)
        title += "\n(dashed: the base)"
    axes.set_title(title, fontsize=10)
    axes.set_yticks(range(len(outcomes)), [outcome.method for outcome in outcomes])
    axes.invert_yaxis()
    _scale(axes, panel, [value for value in values if value is not None])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _scale(axes: Any, panel: Panel, values: list[float]) -> None:
    """Scale an axis with room for the labels; bars carry their figures, so that only a logarithmic axis needs marks."""
    if panel.is_log and values:
        axes.set_xscale("log")
        ends = [*values, panel.base or values[0]]
        axes.set_xlim(min(ends) / 2, max(ends) * 10)
        return
    ends = [0.0, panel.base or 0.0, *values]
    room = 0.3 * (max(ends) - min(ends)) or 1.0
    axes.set_xlim(min(ends) - (room if min(ends) < 0 else 0.0), max(ends) + room)
    axes.set_xticks([])
