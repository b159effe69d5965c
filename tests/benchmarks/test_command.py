"""The command `manyhats bench`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import typer
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from server.cli import main
from tests.benchmarks.__main__ import Asked, _goes_on, share
from tests.benchmarks.bench import Bench
from tests.benchmarks.machine import Machine
from tests.benchmarks.peers import all_peers
from tests.benchmarks.workload import names, read

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run() -> Run:
    """Run the command as `main` has it -> (code, what was said)."""
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("bench", **vars(main.bench)["options"])(main.bench)

    def made(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["bench", *words])
        return result.exit_code, result.output

    return made


def test_every_word_goes_to_the_bench(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags, their values and --help are the bench's; its exit code is the command's."""
    asked: list[list[str]] = []

    def started(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", started)
    assert run("--only", "W1", "W3", "--help")[0] == 3
    assert asked[0][1:] == ["-m", "tests.benchmarks", "--only", "W1", "W3", "--help"]


def test_without_a_clone_it_refuses(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the benchmarks are not, a sentence says where they are."""
    monkeypatch.setattr(main, "__file__", str(tmp_path / "server" / "cli" / "main.py"))
    code, said = run()
    assert code == 1
    assert "clone the repository" in said


def test_a_peer_that_breaks_is_named() -> None:
    """What broke is noted with its reason, out of every group of tasks, and nothing is raised."""
    bench = Bench(Machine("a CPU", 2, 2, 0.1, 100.0, 10.0, {}), "base", "auto", {}, {})
    with _goes_on(bench, "llama", Progress(console=Console(quiet=True))):
        _break()
    assert bench.failed == {"llama": "OSError: no such server"}


def _break() -> None:
    raise ExceptionGroup("tasks", [OSError("no such server")])


def test_every_workload_is_asked_of_our_server_every_round() -> None:
    """But for W2, which no figure to reach is made of; without the prefix cache W5 alone."""
    asked: Asked = [(read(name), []) for name in names()]
    rounds = [{one.name for one, _ in share(all_peers()["manyhats"], asked, repeat)} for repeat in (0, 1)]
    assert rounds == [{*names()}, {*names()} - {"W2"}]
    assert [one.name for one, _ in share(all_peers()["manyhats-uncached"], asked, 2)] == ["W5"]


def test_a_bench_that_is_told_to_end_leaves_no_server(tiny_base: Path, tmp_path: Path) -> None:
    """SIGTERM while a server of its starts: the server ends, and then the bench does."""
    words = ["--only", "W1", "--peers", "manyhats", "--base", str(tiny_base), "--out", str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-m", "tests.benchmarks", *words], cwd=root) as process:
        try:
            bench, servers = psutil.Process(process.pid), list[psutil.Process]()
            while not servers:
                assert process.poll() is None, "the bench ended before it had a server"
                time.sleep(0.1)
                servers = [child for child in bench.children(recursive=True) if "serve" in child.cmdline()]
            process.terminate()
            assert process.wait(60) == 128 + signal.SIGTERM
            assert not psutil.wait_procs(servers, 30)[1]
        finally:
            process.kill()
