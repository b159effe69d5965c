"""`python -m tests.benchmarks`: ask every workload of every peer, every method of our own server, and report.

Peers run one after the other, `--repeats` times round, so that slow drift of the machine falls on all of them. Then
our own server alone is asked for each method and for soft prompts.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer
from transformers.utils import logging

from adapters_store.bases import resolve_base
from tests.benchmarks import families, machine, report, soft_prompts, workload
from tests.benchmarks.bench import Bench
from tests.benchmarks.peers import Peer, Setup, all_peers
from tests.benchmarks.shares import Families
from tests.benchmarks.workload import Prompted, Workload
from tests.kit.adapters import make_lora
from tests.kit.families import FAMILIES

Asked = list[tuple[Workload, list[Prompted]]]
STRENGTH = 0.2  # of the random adapters: the answers stay sane
OURS = ("families", "soft-prompts")  # parts that only our own server is asked


def main() -> None:
    """Run the bench and print its tables."""
    arguments, console = _arguments(), Console()
    logging.disable_progress_bar()  # transformers': ours is there
    base = resolve_base(arguments.base, progress=console.print)
    chosen = [workload.read(name, arguments.num_requests) for name in workload.names() if name in arguments.only]
    corpus = AutoTokenizer.from_pretrained(base)(workload.CORPUS.read_text(), verbose=False).input_ids
    peers = {name: peer for name, peer in all_peers().items() if name in (arguments.peers or [name])}
    bench = _begin(arguments, base, peers, chosen)
    with (
        tempfile.TemporaryDirectory(prefix="manyhats-bench-") as scratch,
        Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        ) as progress,
    ):
        setup = Setup(base, [], Path(scratch), arguments.num_threads, arguments.precision)
        if chosen:
            asked = [(one, workload.prompted(one, corpus)) for one in chosen]
            _ask_peers(bench, arguments, peers, setup, asked, progress)
        if any(part in OURS for part in arguments.only):
            _ask_ourselves(bench, arguments, setup, corpus, progress)
    console.print(Markdown(report.markdown(bench)))
    console.print(f"written to {arguments.out}/bench.json, bench.md and bench.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parts = [*workload.names(), *OURS]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts of the bench; all, if not given")
    parser.add_argument("--num-requests", type=int, help="the first few requests of each workload and batch")
    parser.add_argument("--peers", nargs="+", choices=all_peers(), help="all that are here, if not given")
    parser.add_argument("--repeats", type=int, default=3, help="of the workloads; medians are reported")
    parser.add_argument("--methods", nargs="+", choices=FAMILIES, default=[*FAMILIES], help="all, if not given")
    parser.add_argument("--rounds", type=int, default=2, help="batches of each method; medians are reported")
    parser.add_argument("--soft-repeats", type=int, default=20, help="first tokens of each soft prompt")
    parser.add_argument("--base", default="smollm2-135m", help="a name, a folder or a hub id")
    parser.add_argument("--precision", default="auto", help="of our own server")
    parser.add_argument("--num-threads", type=int, default=2, help="of each peer")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    return parser.parse_args()


def _begin(arguments: argparse.Namespace, base: Path, peers: dict[str, Peer], chosen: list[Workload]) -> Bench:
    measured = machine.measure(arguments.num_threads)
    return Bench(
        measured,
        arguments.base,
        arguments.precision,
        {one.name: one.title for one in chosen},
        {one.name: machine.limit_tokens_per_s(measured, base, one) for one in chosen},
        {name: peer.title for name, peer in peers.items()},
        skipped={name: reason for name, peer in peers.items() if (reason := peer.missing()) is not None},
    )


def _ask_peers(
    bench: Bench,
    arguments: argparse.Namespace,
    peers: dict[str, Peer],
    setup: Setup,
    asked: Asked,
    progress: Progress,
) -> None:
    """Every workload of every peer, as often as is said."""
    adapters = _make_adapters(setup, [one for one, _ in asked], progress)
    for repeat in range(arguments.repeats):
        for name in [name for name in peers if name not in bench.skipped]:
            folder = setup.scratch / f"{name}-{repeat}"
            folder.mkdir()
            _run(bench, name, peers[name], replace(setup, adapters=adapters, scratch=folder), asked, progress)
            report.write(bench, arguments.out)


def _make_adapters(setup: Setup, chosen: list[Workload], progress: Progress) -> list[Path]:
    """The adapters that any of the workloads wears; workloads of one bench share them."""
    most = max(chosen, key=lambda one: one.num_adapters)
    numbers = progress.track(range(most.num_adapters), description="making adapters")
    return [
        make_lora(setup.scratch / f"adapter-{number}", setup.base, seed=number, strength=STRENGTH, **most.lora)
        for number in numbers
    ]


def _run(bench: Bench, name: str, peer: Peer, setup: Setup, asked: Asked, progress: Progress) -> None:
    """One round of one peer."""
    starting = progress.add_task(f"{name}: starting", total=None)
    with peer.start(setup) as session:
        progress.remove_task(starting)
        for one, requests in asked:
            task = progress.add_task(f"{name} {one.name}", total=len(requests))
            bench.runs.append(session.run(one, requests, _advance(progress, task)))
        bench.facts.setdefault(name, []).append(session.facts)


def _ask_ourselves(
    bench: Bench, arguments: argparse.Namespace, setup: Setup, corpus: list[int], progress: Progress
) -> None:
    """Batches of every method, and soft prompts alone, on one server of ours."""
    prompts = families.cut_prompts(corpus, arguments.num_requests or families.NUM_REQUESTS)
    bench.families = Families(len(prompts), families.NUM_PROMPT, families.NUM_TOKENS)
    with families.start(setup) as server:
        if "families" in arguments.only:
            batches = families.Batches(server, setup, prompts, bench.families)
            num = families.num_batches(len(arguments.methods), arguments.rounds)
            for _ in progress.track(batches.run(arguments.methods, arguments.rounds), num, description="families"):
                report.write(bench, arguments.out)
        if "soft-prompts" in arguments.only:
            waits = soft_prompts.run(server, setup, corpus, arguments.soft_repeats)
            for wait in progress.track(waits, soft_prompts.NUM_WAITS, description="soft prompts"):
                bench.families.waits.append(wait)
                report.write(bench, arguments.out)


def _advance(progress: Progress, task: TaskID) -> Callable[[], None]:
    return lambda: progress.advance(task)


if __name__ == "__main__":
    main()
