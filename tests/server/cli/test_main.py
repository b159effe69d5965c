"""The command: every setting a flag, a wrong one a sentence, and a curl that works when it is pasted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from adapters_store.base.cache import VARIABLE
from server import logs
from server.cli.main import main, serve
from server.engine.fake import FakeEngineClient
from server.settings import Settings, variable
from tests.server.world import ready_of

MANYHATS = Path(sys.executable).parent / "manyhats"
KEY = "k" * 16


@dataclass
class Shown:
    """The output of a command, and its exit code."""

    code: int
    out: str
    err: str


Run = Callable[..., Shown]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command to its end, in this process: it takes seconds to import."""

    monkeypatch.setenv(VARIABLE, "")  # `serve` sets it: at the end it is what it was
    monkeypatch.delenv(VARIABLE)

    def made(*words: str, **environment: str) -> Shown:
        for name, value in {"COLUMNS": "300", "TERM": "dumb", "NO_COLOR": "1", **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["manyhats", *words])
        monkeypatch.setattr(logs, "install", lambda _level, _form: None)
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return Shown(int(end.value.code or 0), said.out, said.err)

    return made


def test_help_has_every_setting(run: Run) -> None:
    """`serve --help` has each setting with its meaning, default and variable; the key alone is no flag.

    A command line would show the key to everyone on the machine.
    """
    shown = run("serve", "--help")
    assert shown.code == 0
    for name, field in Settings.model_fields.items():
        if name == "admin_key":
            assert "--admin-key" not in shown.out
            continue
        assert f"--{name.rstrip('_').replace('_', '-')}" in shown.out
        assert variable(name) in shown.out
        assert str(field.description).split()[0] in shown.out
    assert str(serve.__doc__) in shown.out
    assert "768MiB" in shown.out.replace(".0", "")


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_command_lists_its_subcommands(run: Run, words: list[str]) -> None:
    """`manyhats` alone and with --help lists what there is."""
    shown = run(*words)
    assert "serve" in shown.out + shown.err and "train" in shown.out + shown.err


def test_the_version_is_the_packages(run: Run) -> None:
    """`manyhats --version` prints the version that is installed."""
    shown = run("--version")
    assert (shown.code, shown.out) == (0, f"manyhats {metadata.version('manyhats')}\n")


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        (["--host", "0.0.0.0"], {}, "MANYHATS_ADMIN_KEY"),  # noqa: S104 - it must be refused
        (["--port", "x"], {}, "port"),
        (["--max-running", "0"], {}, "max_running"),
        (["--base", "/nowhere/[x]"], {}, "/nowhere/[x]"),
        ([], {"MANYHATS_MAX_RUNING": "1"}, "did you mean MANYHATS_MAX_RUNNING?"),
        ([], {"MANYHATS_PORT": "x"}, "port"),
        ([], {"MANYHATS_ADMIN_KEY": "guess-me"}, "shorter than 16"),
    ],
)
def test_what_cannot_be_meant(run: Run, words: list[str], environment: dict[str, str], says: str) -> None:
    """A wrong setting ends the command with code 1 and one sentence, not a traceback; the key is not in it."""
    shown = run("serve", *(words if "--port" in words or environment else [*words, "--port", "0"]), **environment)
    assert shown.code == 1
    assert "manyhats cannot start:" in shown.err and says in shown.err, shown.err
    assert "Traceback" not in shown.err and "guess-me" not in shown.err


@pytest.mark.parametrize("name", [name for name, field in Settings.model_fields.items() if field.annotation is bool])
def test_what_is_on_can_be_turned_off(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that is on or off has a flag for each; without either, the variable decides."""
    seen, word = list[dict[str, Any]](), name.replace("_", "-")

    def settings(**flags: Any) -> Settings:
        seen.append(flags)
        return Settings(**flags)

    monkeypatch.setattr("server.cli.serve.Settings", settings)
    monkeypatch.setattr("server.cli.serve.resolve_base", lambda *_: pytest.exit("no base is needed"))
    for words in ([f"--no-{word}"], [f"--{word}"], []):
        with contextlib.suppress(pytest.exit.Exception):
            run("serve", *words, "--port", "0")
    assert [flags.get(name) for flags in seen] == [False, True, None]


def test_a_flag_that_is_none(run: Run) -> None:
    """An unknown flag is refused with code 2."""
    assert run("serve", "--prot", "1").code == 2


def test_a_server_that_cannot_start_ends_with_1(
    run: Run, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of which a room cannot start ends with code 1 and the reason."""
    monkeypatch.setattr("server.cli.serve.ProcessEngineClient", lambda _config: FakeEngineClient(ready_of(tiny_base)))
    words = ["--base", str(tiny_base), "--data", str(tmp_path), "--import", str(tmp_path / "none")]
    shown = run("serve", *words, "--port", "0")
    assert shown.code == 1
    assert "manyhats cannot start:" in shown.err and "--import takes a folder" in shown.err
    assert "curl" not in shown.err


def test_a_port_that_is_taken(run: Run, tiny_base: Path, tmp_path: Path) -> None:
    """A port that is taken ends the command with code 1 and the reason, before anything is loaded."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        shown = run("serve", "--base", str(tiny_base), "--data", str(tmp_path / "data"), "--port", port)
    assert shown.code == 1
    assert "in use" in shown.err and port in shown.err and "curl" not in shown.err
    assert not (tmp_path / "data").exists()


@contextlib.contextmanager
def serving(base: Path, data: Path, *words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that has greeted, and what it has said by then."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command: list[str | Path] = [
        MANYHATS,
        "serve",
        "--base",
        str(base),
        "--data",
        str(data),
        "--port",
        str(port),
        *words,
    ]
    env = {**os.environ, "OMP_WAIT_POLICY": "passive", "NO_COLOR": "1", **environment}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    killer = threading.Timer(60, process.kill)
    killer.start()
    assert process.stderr is not None
    said = ""
    try:
        for line in process.stderr:
            message = json.loads(line)["message"]  # no line is anything else
            said += f"{message}\n"
            if message.startswith("  curl"):
                break
        yield process, said
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        process.stderr.close()
        killer.cancel()


def children(pid: int) -> list[int]:
    """Processes below a process."""
    found = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def test_serve_and_the_curl_that_it_prints(tiny_base: Path, tmp_path: Path, loras: list[Path]) -> None:
    """`serve` greets with what it serves and a curl that works when pasted, with a key; SIGTERM ends it all."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "hat").symlink_to(loras[0])
    words = ["--import", str(tree), "--kv-cache-bytes", "16MiB", "--num-threads", "1"]
    with serving(tiny_base, tmp_path / "data", *words, MANYHATS_ADMIN_KEY=KEY) as (process, said):
        assert re.search(r"manyhats serves .* \(\w+\) on http://127.0.0.1:\d+, ready after [\d.]+ s", said), said
        assert "Tasks: base, hat" in said
        (curl,) = (line.strip() for line in said.splitlines() if line.startswith("  curl"))
        deadline = time.monotonic() + 10
        env = {**os.environ, "MANYHATS_ADMIN_KEY": KEY}
        answer = ""
        while not answer and time.monotonic() < deadline:  # it greets just before it listens
            shown = subprocess.run(
                ["bash", "-c", curl], capture_output=True, text=True, timeout=30, env=env, check=False
            )
            answer = shown.stdout
        body = json.loads(answer)
        assert body["task"] == "base" and body["choices"][0]["token_ids"], answer
        assert isinstance(process.args, list)
        assert KEY not in said and KEY not in shlex.join(str(word) for word in process.args)
        engines = children(process.pid)
        assert engines
    assert process.returncode == 0
    assert not [pid for pid in engines if Path(f"/proc/{pid}").exists()]
