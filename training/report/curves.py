"""Curves of a run as a PNG: loss on the training rows, and on the evaluation rows if it was taken."""

from __future__ import annotations

import io
from collections.abc import Sequence

from training.report.step_log import Step

CURVES = "curves.png"
SMOOTHING = 0.9  # of the running mean


def draw(steps: Sequence[Step], title: str) -> bytes:
    """Draw the loss and the learning rate by steps; return the PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    numbers = [step.number for step in steps]
    style = {"marker": "."} if len(steps) == 1 else {}
    loss.plot(numbers, [step.loss for step in steps], color="0.8", lw=0.8, label="a step's loss", **style)
    loss.plot(numbers, _running_mean([step.loss for step in steps]), color="C0", label="running mean")
    taken = [step for step in steps if step.eval_loss is not None]
    if taken:
        held = [step.eval_loss for step in taken]
        loss.plot([step.number for step in taken], held, color="C1", marker="o", ms=3, label="evaluation rows")
    loss.set(ylabel="loss", ylim=(0, None), title=title)
    loss.legend(frameon=False)
    rate.plot(numbers, [step.lr for step in steps], color="C2", **style)
    rate.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (loss, rate):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    canvas.print_png(buffer, metadata={"Software": None})  # `savefig` draws it twice
    return buffer.getvalue()


def _running_mean(values: Sequence[float]) -> list[float]:
    """Return the exponential running mean, corrected for its start at zero."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        means.append(mean / weight)
    return means
