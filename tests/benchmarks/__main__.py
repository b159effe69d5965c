"""`python -m tests.benchmarks`: ask every workload of every peer, and report.

Peers run one after the other, `--repeats` times round, so that slow drift of the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer

from adapters_store.bases import resolve_base
from tests.benchmarks import machine, report, workload
from tests.benchmarks.peers import Peer, Setup, all_peers
from tests.benchmarks.workload import Prompted, Workload
from tests.kit.adapters import make_lora

Asked = list[tuple[Workload, list[Prompted]]]
STRENGTH = 0.2  # of the random adapters: the answers stay sane


def main() -> None:
    """Run the bench and print its tables."""
    arguments, console = _arguments(), Console()
    base = resolve_base(arguments.base, progress=console.print)
    chosen = [workload.read(name, arguments.num_requests) for name in arguments.only or workload.names()]
    corpus = AutoTokenizer.from_pretrained(base)(workload.CORPUS.read_text(), verbose=False).input_ids
    asked = [(one, workload.prompted(one, corpus)) for one in chosen]
    peers = {name: peer for name, peer in all_peers().items() if name in (arguments.peers or [name])}
    bench = _begin(arguments, base, peers, chosen)
    with (
        tempfile.TemporaryDirectory(prefix="manyhats-bench-") as scratch,
        Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        ) as progress,
    ):
        adapters = _make_adapters(base, chosen, Path(scratch), progress)
        for repeat in range(arguments.repeats):
            for name in [name for name in peers if name not in bench.skipped]:
                folder = Path(scratch) / f"{name}-{repeat}"
                folder.mkdir()
                setup = Setup(base, adapters, folder, arguments.num_threads, arguments.precision)
                _run(bench, name, peers[name], setup, asked, progress)
                report.write(bench, arguments.out)
    console.print(Markdown(report.markdown(bench)))
    console.print(f"written to {arguments.out}/bench.json, bench.md and bench.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=workload.names(), help="a workload; may be repeated")
    parser.add_argument("--num-requests", type=int, help="the first few requests of each workload")
    parser.add_argument("--peers", nargs="+", choices=all_peers(), help="all that are here, if not given")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; medians are reported")
    parser.add_argument("--base", default="smollm2-135m", help="a name, a folder or a hub id")
    parser.add_argument("--precision", default="auto", help="of our own server")
    parser.add_argument("--num-threads", type=int, default=2, help="of each peer")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    return parser.parse_args()


def _begin(arguments: argparse.Namespace, base: Path, peers: dict[str, Peer], chosen: list[Workload]) -> report.Bench:
    measured = machine.measure(arguments.num_threads)
    return report.Bench(
        measured,
        arguments.base,
        arguments.precision,
        {one.name: one.title for one in chosen},
        {one.name: machine.limit_tokens_per_s(measured, base, one) for one in chosen},
        {name: peer.title for name, peer in peers.items()},
        skipped={name: reason for name, peer in peers.items() if (reason := peer.missing()) is not None},
    )


def _make_adapters(base: Path, chosen: list[Workload], scratch: Path, progress: Progress) -> list[Path]:
    """The adapters that any of the workloads wears; workloads of one bench share them."""
    most = max(chosen, key=lambda one: one.num_adapters)
    numbers = progress.track(range(most.num_adapters), description="making adapters")
    return [
        make_lora(scratch / f"adapter-{number}", base, seed=number, strength=STRENGTH, **most.lora)
        for number in numbers
    ]


def _run(bench: report.Bench, name: str, peer: Peer, setup: Setup, asked: Asked, progress: Progress) -> None:
    """One round of one peer."""
    starting = progress.add_task(f"{name}: starting", total=None)
    with peer.start(setup) as session:
        progress.remove_task(starting)
        for one, requests in asked:
            task = progress.add_task(f"{name} {one.name}", total=len(requests))
            bench.runs.append(session.run(one, requests, _advance(progress, task)))
        bench.facts.setdefault(name, []).append(session.facts)


def _advance(progress: Progress, task: TaskID) -> Callable[[], None]:
    return lambda: progress.advance(task)


if __name__ == "__main__":
    main()
