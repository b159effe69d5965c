"""`manyhats bench`, `make bench`: ask every workload of every peer, every method of our own server, and report.

Peers run one after the other, `--repeats` times round, so that slow drift of the machine falls on all of them; some are
asked some workloads in the first round only. Then our own server alone is asked for each method, for soft prompts, and
while adapters come and go. On 2 cores all of it takes over an hour with PEFT, OpenVINO and llama-server: of each of
3 rounds our server has 6 minutes, PEFT, OpenVINO and llama-server 2 to 4 each, and more in the first; vLLM, if it is
there, 10 more. What is measured is written after every step. A peer that breaks is named, and the others go on.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from msgspec import structs
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer
from transformers.utils import logging

from adapters_store.base.resolve import resolve_base
from tests.benchmarks import churn, families, machine, report, soft_prompts, workload
from tests.benchmarks.artifacts import MAKERS, moved
from tests.benchmarks.bench import Bench
from tests.benchmarks.peers import Peer, Setup, all_peers
from tests.benchmarks.peers.manyhats import CAPACITY_OF
from tests.benchmarks.shares import Families
from tests.benchmarks.workload import Prompted, Workload
from tests.kit.adapters import make_lora

Asked = list[tuple[Workload, list[Prompted]]]
STRENGTH = 0.2  # of the random adapters: the answers stay sane
NUM_MADE = 32  # adapters; more are made of these, which is faster
CHURN = "churn"
OURS = ("families", "soft-prompts", CHURN)  # parts that only our own server is asked


def main() -> None:
    """Run the bench and print its tables."""
    arguments, console = _arguments(), Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # on the way out the servers are stopped
    logging.disable_progress_bar()  # transformers': ours is there
    base = resolve_base(arguments.base, progress=console.print)
    chosen = choose(arguments.only, arguments.num_requests)
    corpus = AutoTokenizer.from_pretrained(base)(workload.CORPUS.read_text(), verbose=False).input_ids
    peers = {name: peer for name, peer in all_peers().items() if name in (arguments.peers or [name])}
    bench = _begin(arguments, peers, chosen)
    with (
        tempfile.TemporaryDirectory(prefix="manyhats-bench-") as scratch,
        Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        ) as progress,
    ):
        scratched = Path(scratch)
        setup = Setup(base, [], scratched, arguments.num_threads, arguments.precision, scratched)
        if chosen:
            asked = [(one, workload.prompted(one, corpus)) for one in chosen]
            _ask_peers(bench, arguments, peers, setup, asked, progress)
        if CHURN in arguments.only:
            with _goes_on(bench, CHURN, progress):
                steps = churn.run(setup, corpus, arguments.churn_seconds, bench.churn)
                for _ in progress.track(steps, len(churn.STEPS), description=CHURN):
                    report.write(bench, arguments.out)
        if any(part in OURS and part != CHURN for part in arguments.only):
            with _goes_on(bench, "families", progress):
                _ask_ourselves(bench, arguments, setup, corpus, progress)
    report.write(bench, arguments.out)
    console.print(Markdown(report.markdown(bench)))
    console.print(f"written to {arguments.out.resolve()}: bench.json, bench.md and bench.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="manyhats bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = [*workload.parts(), *OURS]
    parser.add_argument(
        "--only",
        nargs="+",
        choices=parts,
        default=parts,
        metavar="PART",
        help=f"of {', '.join(parts)}; all, if not given",
    )
    parser.add_argument("--num-requests", type=int, help="the first few requests of each workload and batch")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=all_peers(),
        metavar="PEER",
        help=f"of {', '.join(all_peers())}; all that are here, if not given",
    )
    parser.add_argument("--repeats", type=int, default=3, help="of the workloads; medians are reported (3)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=MAKERS,
        default=[*MAKERS],
        metavar="METHOD",
        help=f"of {', '.join(MAKERS)}; all, if not given",
    )
    parser.add_argument("--rounds", type=int, default=3, help="batches of each method; medians are reported (3)")
    parser.add_argument("--soft-repeats", type=int, default=20, help="first tokens of each soft prompt (20)")
    parser.add_argument("--churn-seconds", type=float, default=60.0, help="of each of 4 steps of adapters that go (60)")
    parser.add_argument("--base", default="smollm2-135m", help="a name, a folder or a hub id (smollm2-135m)")
    parser.add_argument("--precision", default="auto", help="of our own server (auto)")
    parser.add_argument("--num-threads", type=int, default=2, help="of each peer (2)")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of the report (build/bench)")
    return parser.parse_args()


def choose(parts: list[str], num_requests: int | None) -> list[Workload]:
    """The workloads of some parts, in the order in which they are asked.

    An open loop brings the workload that its pace is of. What has more adapters than fit comes last: it empties slots.
    """
    names = [name for name in workload.names() if name.partition("-")[0] in parts]
    chosen = [workload.read(name, num_requests) for name in names]
    if any(one.load for one in chosen) and CAPACITY_OF not in names:
        chosen = [workload.read(CAPACITY_OF, num_requests), *chosen]
    return sorted(chosen, key=lambda one: one.num_adapters)


def _begin(arguments: argparse.Namespace, peers: dict[str, Peer], chosen: list[Workload]) -> Bench:
    return Bench(
        machine.measure(arguments.num_threads),
        arguments.base,
        arguments.precision,
        {one.name: one.title for one in chosen},
        {name: peer.title for name, peer in peers.items()},
        skipped={name: reason for name, peer in peers.items() if (reason := peer.missing()) is not None},
    )


@contextmanager
def _goes_on(bench: Bench, name: str, progress: Progress) -> Iterator[None]:
    """Whatever breaks a peer is noted under its name, and the bench goes on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a peer can fail in any way; what it did is reported
        root = _root(error)
        bench.failed[name] = f"{type(root).__name__}: {root}"[:1000]
        progress.console.print(f"{name} broke: {bench.failed[name]}", markup=False)


def _root(error: BaseException) -> BaseException:
    """What is inside of groups of one."""
    return _root(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


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
            mine = share(peers[name], asked, repeat)
            if not mine or name in bench.failed:
                continue
            folder = setup.scratch / f"{name}-{repeat}"
            folder.mkdir()
            most = max(one.num_adapters for one, _ in mine)
            with _goes_on(bench, name, progress):
                _run(bench, name, peers[name], replace(setup, adapters=adapters[:most], scratch=folder), mine, progress)
            if name in bench.failed:
                _keep_logs(folder, arguments.out / name)
            shutil.rmtree(folder, ignore_errors=True)
            report.write(bench, arguments.out)


def _keep_logs(folder: Path, into: Path) -> None:
    """What a peer that broke said last."""
    into.mkdir(parents=True, exist_ok=True)
    for log in folder.rglob("*.log"):
        shutil.copy(log, into)


def share(peer: Peer, asked: Asked, repeat: int) -> Asked:
    """The workloads that a peer is asked in a round."""
    names = {*peer.workloads, *(peer.once if repeat == 0 else ())}
    return [(one, requests) for one, requests in asked if one.name in names]


def _make_adapters(setup: Setup, chosen: list[Workload], progress: Progress) -> list[Path]:
    """The adapters that any of the workloads wears; workloads of one bench share them."""
    most = max(chosen, key=lambda one: one.num_adapters)
    folders: list[Path] = []
    for number in progress.track(range(most.num_adapters), description="making adapters"):
        folder = setup.scratch / f"adapter-{number}"
        if number < NUM_MADE:
            make_lora(folder, setup.base, seed=number, strength=STRENGTH, **most.lora)
        else:
            moved(folders[number % NUM_MADE], folder, number)
        folders.append(folder)
    return folders


def _run(bench: Bench, name: str, peer: Peer, setup: Setup, asked: Asked, progress: Progress) -> None:
    """One round of one peer. The machine's limit is measured before each workload: a shared machine's drifts."""
    starting = progress.add_task(f"{name}: starting", total=None)
    try:
        with peer.start(setup) as session:
            progress.remove_task(starting)
            bench.facts.setdefault(name, []).append(session.facts)
            for one, requests in asked:
                task = progress.add_task(f"{name} {one.name}", total=len(requests))
                limit = machine.limit_tokens_per_s(machine.measure(setup.num_threads), setup.base, one)
                run = session.run(one, requests, _advance(progress, task))
                bench.runs.append(structs.replace(run, limit_per_s=limit))
    finally:
        if starting in progress.task_ids:
            progress.remove_task(starting)


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
