"""The plot of a bench: a panel for each thing that was measured."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tests.benchmarks.bench import Bench
from tests.benchmarks.peers import ME

BAR_INCHES = 0.2  # of a method's bar
SMALL = 8  # of the fonts


def plot(bench: Bench, path: Path) -> None:
    """Save `figure_of` a bench."""
    figure_of(bench).savefig(path, dpi=110)


def figure_of(bench: Bench) -> Figure:
    """Output tokens/s by workload and peer, our own server's times to the first token, what each method keeps."""
    num_methods = len(bench.families.shares())
    has_times = any(run.peer == ME for run in bench.runs)
    given = [(_speeds, bool(bench.runs)), (_times, has_times), (_shares, num_methods > 0)]
    panels = [draw for draw, is_given in given if is_given]
    size = (5.5 * max(len(panels), 1), max(4.0, 1.0 + BAR_INCHES * num_methods))
    figure = Figure(figsize=size, layout="constrained")
    for place, draw in enumerate(panels):
        draw(figure.add_subplot(1, len(panels), place + 1), bench)
    return figure


def _speeds(axes: Any, bench: Bench) -> None:
    measured = bench.figures()
    workloads = sorted({workload for _, workload in measured})
    shown = list(dict.fromkeys(peer for peer, _ in measured))
    width = 0.8 / len(shown)
    for place, peer in enumerate(shown):
        heights = [measured[peer, w].output_tokens_per_s if (peer, w) in measured else 0.0 for w in workloads]
        where = [index + (place - (len(shown) - 1) / 2) * width for index in range(len(workloads))]
        axes.bar_label(axes.bar(where, heights, width, label=bench.peers[peer]), fmt="%.0f", fontsize=SMALL)
    axes.set(title="output tokens/s", xticks=range(len(workloads)), xticklabels=workloads)
    axes.legend(fontsize=SMALL, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)  # below: it covers no bar


def _times(axes: Any, bench: Bench) -> None:
    runs = [run for run in bench.runs if run.peer == ME]
    for workload in sorted({run.workload for run in runs}):
        waits = sorted(t.first - t.started for run in runs if run.workload == workload for t in run.timings if t.first)
        axes.plot(waits, [(rank + 1) / len(waits) for rank in range(len(waits))], label=workload)
    axes.set(title="time to first token, manyhats", xlabel="s", ylabel="share of requests")
    axes.legend(fontsize=SMALL)


def _shares(axes: Any, bench: Bench) -> None:
    shares = {method: statistics.median(each) for method, each in bench.families.shares().items()}
    axes.bar_label(axes.barh(list(shares), list(shares.values())), fmt="{:.0%}", fontsize=SMALL, padding=2)
    axes.axvline(1.0, color="gray", linewidth=0.8)
    axes.set(title="decode speed kept, of the base's", xlim=(0, 1.15 * max(1.0, *shares.values())))
    axes.tick_params(axis="y", labelsize=SMALL)
    axes.margins(y=0.01)
    axes.invert_yaxis()
