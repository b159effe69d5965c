"""The plot of a bench: a panel for each thing that was measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tests.benchmarks.bench import Bench
from tests.benchmarks.peers import ME, UNCACHED
from tests.benchmarks.targets import Outcome, outcomes

PANEL_INCHES = 6.4, 4.2
BAR_INCHES = 0.21  # of a method's bar
SMALL = 8  # of the fonts
COLORS = {ME: "#1f5fa8", UNCACHED: "#9dbfe3", "peft": "#d1883c", "openvino": "#6b4fa0", "llama": "#3f8f5b"}
OTHER, REACHED, MISSED, PALE = "#8a8a8a", "#3f8f5b", "#c8553d", "#e3e3e3"
MOST_SHOWN = 2.0  # times its bound: a figure that is far past it would hide the others

Panel = Callable[[Any, Bench], None]


def plot(bench: Bench, path: Path) -> None:
    """Save `figure_of` a bench."""
    figure_of(bench).savefig(path, dpi=120)


def figure_of(bench: Bench) -> Figure:
    """Output tokens/s by workload and peer, the figures to reach, first tokens, open loops, what each method keeps.

    Panels in two columns; the methods, which are many, in one of their own.
    """
    panels, num_methods = _panels(bench), len(bench.families.shares())
    num_columns, num_rows = min(len(panels), 2), max(-(-len(panels) // 2), 1)
    height = max(PANEL_INCHES[1] * num_rows, 1.0 + BAR_INCHES * num_methods)
    columns = num_columns + (num_methods > 0)
    figure = Figure(figsize=(PANEL_INCHES[0] * max(columns, 1), height), layout="constrained")
    if not columns:
        return figure
    grid = figure.add_gridspec(num_rows, columns)
    for place, draw in enumerate(panels):
        _draw(figure.add_subplot(grid[divmod(place, num_columns)]), bench, draw)
    if num_methods:
        _draw(figure.add_subplot(grid[:, -1]), bench, _shares)
    return figure


def _panels(bench: Bench) -> list[Panel]:
    """Those of which something was measured."""
    mine = [run for run in bench.runs if run.peer == ME]
    given: list[tuple[Panel, bool]] = [
        (_speeds, any(_is_closed(bench, run.workload) for run in bench.runs)),
        (_targets, any(one.value is not None for one in outcomes(bench))),
        (_times, bool(mine)),
        (_open_loops, any(run.offered_per_s is not None for run in mine)),
    ]
    return [draw for draw, is_given in given if is_given]


def _draw(axes: Any, bench: Bench, draw: Panel) -> None:
    """One panel, with no more lines than it needs."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)
    draw(axes, bench)
    axes.title.set_fontsize(11)
    axes.title.set_fontweight("bold")


def _is_closed(bench: Bench, workload: str) -> bool:
    return not any(run.offered_per_s is not None for run in bench.runs if run.workload == workload)


def _speeds(axes: Any, bench: Bench) -> None:
    """Bars side by side where there are peers; nothing where a peer was not asked."""
    measured = {key: one for key, one in bench.figures().items() if _is_closed(bench, key[1])}
    workloads = sorted({workload for _, workload in measured})
    asked = {w: [peer for peer in bench.peers if (peer, w) in measured] for w in workloads}
    width = 0.84 / max(map(len, asked.values()))
    for peer in dict.fromkeys(peer for peer, _ in measured):
        mine = [(place, w) for place, w in enumerate(workloads) if peer in asked[w]]
        where = [place + (asked[w].index(peer) - (len(asked[w]) - 1) / 2) * width for place, w in mine]
        heights = [measured[peer, w].output_tokens_per_s for _, w in mine]
        bars = axes.bar(where, heights, 0.92 * width, label=bench.peers[peer], color=COLORS.get(peer, OTHER))
        axes.bar_label(bars, fmt="%.0f", fontsize=SMALL - 1, padding=1)
    axes.set(title="output tokens/s", xticks=range(len(workloads)))
    axes.set_xticklabels([workload.replace("-", "\n") for workload in workloads])
    axes.legend(
        fontsize=SMALL, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False
    )  # below the bars


def _targets(axes: Any, bench: Bench) -> None:
    """How far each figure is, its bound being 1."""
    known = [one for one in outcomes(bench) if one.value is not None]
    lengths = [min(_distance(one), MOST_SHOWN) for one in known]
    colors = [REACHED if one.verdict == "yes" else MISSED for one in known]
    bars = axes.barh(range(len(known)), lengths, color=colors, height=0.72)
    axes.axvline(1.0, color="black", linewidth=1.0, zorder=0)
    labels = [f"{one.shown} ({one.target.to_reach()})" for one in known]
    clear = {"facecolor": "white", "linewidth": 0, "pad": 0.5}  # over the line
    axes.bar_label(bars, labels, fontsize=SMALL - 1, padding=4, bbox=clear)
    axes.set(title="figures to reach: measured (bound)", xlim=(0, MOST_SHOWN * 1.35), xticks=[0, 1, MOST_SHOWN])
    axes.set_xticklabels(["", "reached", ""])
    axes.set_yticks(range(len(known)), [one.target.title for one in known])
    axes.invert_yaxis()


def _distance(one: Outcome) -> float:
    """The value over its bound, or the bound over the value where less is better."""
    if one.value is None or not one.value:
        return MOST_SHOWN
    return one.target.bound / one.value if one.target.is_most else one.value / one.target.bound


def _times(axes: Any, bench: Bench) -> None:
    """How many requests had their first token by when."""
    runs = [run for run in bench.runs if run.peer == ME]
    workloads = sorted({run.workload for run in runs})
    for workload in workloads:
        waits = sorted(
            1e3 * (t.first - t.started)
            for run in runs
            if run.workload == workload
            for t in run.timings
            if t.first is not None
        )
        style = "-" if _is_closed(bench, workload) else "--"
        axes.plot(waits, [(rank + 1) / len(waits) for rank in range(len(waits))], style, label=workload)
    axes.set(title="time to first token, manyhats", xlabel="ms", ylabel="share of requests", xscale="log", ylim=(0, 1))
    _plain_numbers(axes.xaxis)
    axes.grid(color=PALE)
    axes.legend(fontsize=SMALL, frameon=False)


def _open_loops(axes: Any, bench: Bench) -> None:
    """Times against the load that is offered, medians over the repeats."""
    measured, offered = bench.figures(), dict[str, list[float]]()
    for run in bench.runs:
        if run.peer == ME and run.offered_per_s is not None:
            offered.setdefault(run.workload, []).append(run.offered_per_s)
    points = sorted((statistics.median(rates), workload) for workload, rates in offered.items())
    spreads = {"first token": "ttft_ms", "between tokens": "inter_token_ms"}
    for color, (what, name) in zip((COLORS[ME], COLORS["peft"]), spreads.items(), strict=True):
        for percentile, style in (("p50", "-"), ("p95", "--")):
            heights = [getattr(measured[ME, workload], name)[percentile] for _, workload in points]
            axes.plot(
                [rate for rate, _ in points], heights, style, marker="o", color=color, label=f"{what}, {percentile}"
            )
    axes.set(title="open loop: times at the load that arrives", ylabel="ms", yscale="log")
    axes.set_xticks([rate for rate, _ in points], [f"{w.partition('-')[2]}\n{rate:.2f}/s" for rate, w in points])
    axes.set_xlabel("share of W3's speed, requests/s")
    _plain_numbers(axes.yaxis)
    axes.grid(color=PALE)
    axes.legend(fontsize=SMALL, frameon=False)


def _plain_numbers(axis: Any) -> None:
    """1,000 instead of 10^3."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _shares(axes: Any, bench: Bench) -> None:
    shares = {method: statistics.median(each) for method, each in bench.families.shares().items()}
    bars = axes.barh(list(shares), list(shares.values()), color=COLORS[ME], height=0.76)
    axes.bar_label(bars, fmt="{:.0%}", fontsize=SMALL, padding=2)
    axes.axvline(1.0, color="gray", linewidth=0.8)
    axes.set(title="decode speed kept, of the base's", xlim=(0, 1.15 * max(1.0, *shares.values())))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.margins(y=0.01)
    axes.invert_yaxis()
