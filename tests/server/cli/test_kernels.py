"""The first start compiles the kernels and says so; the second one finds them and says nothing."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path

import pytest
from rich.console import Console

from adapters_store.base import cache as caches
from server.cli import kernels
from server.cli.kernels import PARTS, Compilation, CompilerError, compile_kernels
from server.model.backends import compile_cpu as compiler
from server.model.backends import kernel_cache
from server.model.backends.kernel_cache import KernelCache, find_cache

ECHO = "import sys, time\nfor line in sys.stdin: time.sleep(0.05); print(line.strip(), flush=True)"
DIES = "import sys\nfor line in sys.stdin:\n if 'adapters' in line: sys.exit(3)\n print(line.strip(), flush=True)"


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compile in processes that do nothing, and keep the result in a home of the test's own."""
    monkeypatch.setattr(kernels, "COMPILER", (sys.executable, "-c", ECHO))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))


def said_by(cache: KernelCache | None = None, is_terminal: bool = False) -> str:
    """What a start prints about kernels."""
    console = Console(file=io.StringIO(), width=100, force_terminal=is_terminal)
    compile_kernels("fp32", console, cache)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def is_running(pid: str) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_first_start_says_it_and_the_second_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines say what is being compiled and how many are left, a sentence where it is kept; then all is silent."""
    first = said_by().splitlines()
    assert first[0].startswith("compiling kernels, once: 8 of 8 parts left, now adapters") and len(first) <= 10
    assert "1 of 8 parts left, now " in first[-2]
    assert f"{find_cache().folder}: the next start does not compile" in first[-1]
    monkeypatch.setattr(kernels, "COMPILER", ("false",))
    assert said_by() == ""


def test_a_terminal_has_a_bar() -> None:
    """On a terminal there is one bar instead of lines."""
    text = said_by(is_terminal=True)
    assert "compiling kernels" in text and "/8" in text and "parts left" not in text


def test_another_precision_is_another_set() -> None:
    """What was compiled for one precision says nothing of another."""
    said_by()
    assert find_cache().is_complete("fp32") and not find_cache().is_complete("fp16")


def test_all_cores_are_used_and_the_decoder_is_last() -> None:
    """As many parts are compiled at once as there are processes, and the one that is made of the others is last."""
    seen: list[list[str]] = []
    Compilation("fp32", 3).run(lambda running, _num_done: seen.append(sorted(running)))
    seen = [running for running, _again in groupby(seen)]  # a part that takes long is told more than once
    assert max(map(len, seen)) == 3
    assert seen[-1] == [] and seen[-2] == ["decoder"] and all("decoder" not in running for running in seen[:-2])


def test_a_part_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A process that dies is named with its part, the start goes on, and the next start tries again."""
    monkeypatch.setattr(kernels, "COMPILER", (sys.executable, "-c", DIES))
    with pytest.raises(CompilerError, match="adapters ended with code 3"):
        Compilation("fp32", 1).run(lambda _running, _num_done: None)
    assert "the next start" not in said_by() and not find_cache().is_complete("fp32")
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "adapters" in record.reason  # type: ignore[attr-defined]
    monkeypatch.setattr(kernels, "COMPILER", (sys.executable, "-c", ECHO))
    assert "the next start does not compile" in said_by()


def test_compilers_end_with_us(tmp_path: Path) -> None:
    """Where we are killed, no compiling process is left behind."""
    file = tmp_path / "pids"
    child = f"import os, sys\nopen({str(file)!r}, 'a').write(f'{{os.getpid()}} ')\nfor line in sys.stdin: pass"
    program = (
        "import sys; from server.cli import kernels\n"
        f"kernels.COMPILER = (sys.executable, '-c', {child!r})\n"
        "kernels.Compilation('fp32', 2).run(lambda *_: None)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(kernels.__file__).parents[2])
    deadline = time.monotonic() + 60
    while not file.is_file() or len(file.read_text().split()) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    while any(map(is_running, file.read_text().split())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache that cannot be written is named in a warning; kernels are kept in a folder of the user's meanwhile."""
    real = caches.is_writable
    monkeypatch.setattr(caches, "is_writable", lambda folder: "home" not in str(folder) and real(folder))
    first, second = said_by(), said_by()
    assert f"warning: compiled kernels cannot be kept in {tmp_path / 'home' / '.cache'}" in first
    assert f"they are kept in {tmp_path}/manyhats-{os.getuid()}/kernels" in first and "parts left" in first
    assert second.startswith("warning:") and second.count("\n") == 1
    monkeypatch.setattr(caches, "is_writable", lambda _folder: False)
    assert "each start compiles them again" in said_by() and find_cache().folder is None


def test_a_temporary_folder_of_somebody_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that others may write is not taken: compiled kernels are loaded as code."""
    real = caches.is_writable
    monkeypatch.setattr(caches, "is_writable", lambda folder: "home" not in str(folder) and real(folder))
    spare = tmp_path / f"manyhats-{os.getuid()}"
    spare.mkdir(mode=0o777)
    spare.chmod(0o777)
    assert find_cache().folder is None
    spare.chmod(0o700)
    assert find_cache().folder is not None


def test_other_sources_are_compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another text of the kernels has a folder of its own; the same text of another file time is not taken as done."""
    source = tmp_path / "a.py"
    source.write_text("one")
    monkeypatch.setattr(kernel_cache, "SOURCES", (source,))
    first = find_cache()
    first.mark_complete("fp32")
    assert find_cache() == first and first.is_complete("fp32")
    os.utime(source, (1, 1))
    assert find_cache() == first and not first.is_complete("fp32")
    source.write_text("two")
    assert find_cache() != first


def test_the_compiler_is_told_by_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The compiling process compiles each part that it is told, answers with its name, and ends with its input."""
    compiled: list[tuple[str, str]] = []
    monkeypatch.setattr(compiler, "compile_part", lambda *part: compiled.append(part))
    monkeypatch.setattr(sys, "argv", ["compile", "fp32"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("norms\ndecoder\n"))
    compiler.main()
    assert compiled == [("norms", "fp32"), ("decoder", "fp32")] and capsys.readouterr().out == "norms\ndecoder\n"
    assert compiler.PARTS.keys() == PARTS.keys()
