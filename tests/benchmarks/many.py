"""`python -m tests.benchmarks.many`: four small jobs one after another, and the same four in one batch.

A small job has short rows, few at a time: with more, one job's products alone keep two cores busy, and there is nothing
to win. Each has rows, a method or rank, a rate and a seed of its own. The whole commands are timed as a user would run
them (four of one job, one of four), by turns who is first; beside them the same without what every command spends on
starting and on loading the base, and what the manifests say of the steps alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_file

from adapters_store.format.folder import WEIGHTS, read_folder

DATA = Path(__file__).parents[2] / "adapters_store" / "examples" / "data" / "banking77"
OUT = Path("build/bench/many.json")
TARGET = 0.65  # of one after another, at most
NUM_HELD = 40  # rows that each job is scored on
MAX_CHARACTERS = 48  # of a prompt
JOBS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "seed": 0},
    "lora-wide": {"method": "lora", "r": 16, "alpha": 32, "lr": 0.002, "seed": 1},
    "lora-qv": {"method": "lora", "target_modules": "q_proj,v_proj", "lr": 0.005, "seed": 2},
    "bottleneck": {"method": "bottleneck", "bottleneck_size": 32, "seed": 3},
}
# What a process does before its job: the imports, and the base.
LOAD = """
import sys
from training.base import load_base
import training.cli, training.joint.run
load_base(sys.argv[1], "cpu", None, print)
"""


@dataclass
class Seconds:
    """A round: of whole commands, and of the steps as manifests have them."""

    alone: float
    together: float
    steps_alone: float
    steps_together: float
    load: float


@dataclass
class Many:
    """What was measured."""

    base: str
    jobs: dict[str, dict[str, Any]]
    defaults: dict[str, Any]
    num_threads: int
    rounds: list[Seconds] = field(default_factory=list)
    farthest: float = 0.0  # a weight together from the same alone

    def ratios(self) -> dict[str, tuple[float, float, float]]:
        """Per way of counting the medians of one after another, of together, and of their ratio."""
        loads = len(self.jobs)
        counted = {
            "whole commands": [(one.alone, one.together) for one in self.rounds],
            "without start and load": [(one.alone - loads * one.load, one.together - one.load) for one in self.rounds],
            "training steps": [(one.steps_alone, one.steps_together) for one in self.rounds],
        }
        return {
            what: (
                statistics.median(alone for alone, _ in pairs),
                statistics.median(together for _, together in pairs),
                statistics.median(together / alone for alone, together in pairs),
            )
            for what, pairs in counted.items()
        }


def main() -> None:
    """Measure, print a table, and write JSON."""
    arguments, console = _arguments(), Console()
    defaults = {
        "base": arguments.base,
        "template": "{prompt}\\n{completion}",
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
    }
    many = Many(arguments.base, JOBS, defaults, torch.get_num_threads())
    with tempfile.TemporaryDirectory() as scratch, Progress(console=console) as progress:
        jobs = write_data(Path(scratch))
        for number in progress.track(range(arguments.repeats), description="rounds"):
            many.rounds.append(measure(Path(scratch), defaults, jobs, together_first=number % 2 == 1))
        many.farthest = max(farthest(*(Path(scratch) / way / name for way in ("together", "alone"))) for name in jobs)
    console.print(_table(many))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**asdict(many), "ratios": many.ratios()}, indent=2) + "\n")
    console.print(f"weights differ by {many.farthest:.1e} at most; written to {arguments.out}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.many", description=__doc__)
    parser.add_argument("--base", default="smollm2-135m", help="a name, a folder or a hub id")
    parser.add_argument("--steps", type=int, default=100, help="of each job")
    parser.add_argument("--batch-size", type=int, default=2, help="rows of each job in a step")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON of what was measured")
    return parser.parse_args()


def write_data(scratch: Path) -> dict[str, dict[str, Any]]:
    """Each job with rows of its own, every fourth of the short ones; all are scored on the same."""
    with (DATA / "train.csv").open(newline="") as file:
        rows = [(row["text"], row["intent"]) for row in csv.DictReader(file) if len(row["text"]) <= MAX_CHARACTERS]
    held = rows[:: len(rows) // NUM_HELD][:NUM_HELD]
    _write_rows(scratch / "held.jsonl", held)
    jobs = {}
    for place, (name, options) in enumerate(JOBS.items()):
        _write_rows(scratch / f"{name}.jsonl", rows[place :: len(JOBS)])
        jobs[name] = {**options, "data": str(scratch / f"{name}.jsonl"), "eval": str(scratch / "held.jsonl")}
    return jobs


def _write_rows(file: Path, rows: Sequence[tuple[str, str]]) -> None:
    file.write_text("".join(json.dumps({"prompt": text, "completion": intent}) + "\n" for text, intent in rows))


def measure(scratch: Path, defaults: dict[str, Any], jobs: dict[str, dict[str, Any]], together_first: bool) -> Seconds:
    """One round, of which either way is first by turns."""
    times = {}
    for way in ("together", "alone") if together_first else ("alone", "together"):
        began = time.perf_counter()
        run = _together if way == "together" else _alone
        run(scratch / way, defaults, jobs)
        times[way] = time.perf_counter() - began
    began = time.perf_counter()
    _python("-c", LOAD, defaults["base"])
    load = time.perf_counter() - began
    steps = {way: [_step_seconds(scratch / way / name) for name in jobs] for way in times}
    return Seconds(times["alone"], times["together"], sum(steps["alone"]), max(steps["together"]), load)


def _alone(out: Path, defaults: dict[str, Any], jobs: dict[str, dict[str, Any]]) -> None:
    for name, job in jobs.items():
        chosen = {**defaults, **job, "out": out / name}
        flags = [word for key, value in chosen.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        _python("-m", "training", *flags)


def _together(out: Path, defaults: dict[str, Any], jobs: dict[str, dict[str, Any]]) -> None:
    out.mkdir(exist_ok=True)
    file = out.parent / "jobs.yaml"
    named = [{**job, "out": str(out / name)} for name, job in jobs.items()]
    file.write_text(yaml.safe_dump({"defaults": defaults, "jobs": named}))
    _python("-m", "training", "--jobs", str(file))


def _python(*words: str) -> None:
    """A process as a user starts it. Raises with what it said last when it fails."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:3])} failed: {done.stderr[-1000:]}")


def _step_seconds(folder: Path) -> float:
    manifest = read_folder(folder).manifest
    assert manifest is not None
    return float(manifest.training["seconds"])


def farthest(one: Path, other: Path) -> float:
    """The greatest distance between weights of the same name."""
    ours, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def _table(many: Many) -> Table:
    steps, rows = many.defaults["steps"], many.defaults["batch_size"]
    table = Table(
        "",
        "one after another, s",
        "together, s",
        "ratio",
        title=f"{len(many.jobs)} jobs of {steps} steps of {rows} rows",
    )
    for what, (alone, together, ratio) in many.ratios().items():
        table.add_row(what, f"{alone:.1f}", f"{together:.1f}", f"{ratio:.2f} (target {TARGET})")
    return table


if __name__ == "__main__":
    main()
