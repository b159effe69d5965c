"""The log is JSON, line by line, whatever writes to it; at a terminal it is written for a person."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server import logs

SCRIPT = """
import logging, threading, warnings
from server import logs

logs.install("warning")
logging.getLogger("a.library").warning("one\\ntwo")
warnings.warn("old")
logging.getLogger("a.library").warning("%d", "no number")


class Ends:
    def __del__(self):
        raise KeyError("ignored")


Ends()
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
console = logs.console()
console.print("\\n[bold]printed[/]\\n\\n  and indented " + "x" * 300, soft_wrap=True)
raise ValueError("at last")
"""


def test_every_line_is_json() -> None:
    """Records, warnings, what a console prints and exceptions that nobody caught are each one line of JSON."""
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1
    said = [line["message"] for line in lines]
    assert said[0] == "one\ntwo" and "UserWarning: old" in said[1]
    wrong = lines.pop(2)
    assert wrong["message"] == "a record of the log cannot be formatted" and wrong["of"] == "a.library", wrong
    assert wrong["where"] == "<string>:8" and wrong["reason"] == "TypeError"
    assert lines.pop(2)["exception"].endswith("KeyError: 'ignored'")
    said = [line["message"] for line in lines]
    assert [line.get("exception", "").rpartition("\n")[2] for line in lines][2::3] == [
        "ZeroDivisionError: division by zero",
        "ValueError: at last",
    ]
    assert said[3:5] == ["printed", "  and indented " + "x" * 300]
    assert all({"time", "level", "logger", "message", "pid"} <= line.keys() for line in lines)


AT_WORK = """
import logging, sys
from server import logs

logs.install("info", *sys.argv[1:])
console = logs.console(*sys.argv[1:])
secret = "a key"
for _ in range(3):
    logging.getLogger("a.library").warning("full", extra={"cause": "disk 28", "path": "/tmp/x"})
    console.print("printed")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("uvicorn.error").exception("it failed", extra={"color_message": "it [red]failed"})
print("alive")
"""


def run(*words: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    """Run a process that logs at its work."""
    command = [sys.executable, "-c", AT_WORK, *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=60, **streams)


def at_a_terminal(*words: str, **environment: str) -> list[str]:
    """The lines that a terminal shows."""
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"} | environment
    try:
        assert run(*words, stderr=theirs, env=env).stdout == "alive\n"
        os.set_blocking(ours, False)
        return os.read(ours, 2**16).decode().split("\r\n")
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_person_at_a_terminal_reads_lines() -> None:
    """At a terminal a line is the time of day, the level, the message and each field, in colours but for NO_COLOR."""
    coloured, plain = at_a_terminal(), at_a_terminal(NO_COLOR="1")
    assert [re.sub(r"\x1b\[[\d;]*m", "", line)[8:] for line in coloured[:1]] == [line[8:] for line in plain[:1]]
    assert "\x1b[" in coloured[0] and "\x1b[" not in "".join(plain)
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d \[warning *\] full +\[a\.library\] cause='?disk 28'? path=/tmp/x left_out=0 *", plain[0]
    )
    assert plain[1] == "printed" and any(line == "ValueError: broken" for line in plain)
    assert "a key" not in "".join(plain)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_form_can_be_chosen(is_terminal: bool) -> None:
    """`json` is JSON at a terminal too, and `pretty` is for a person in a pipe too."""
    if is_terminal:
        lines = at_a_terminal("json")
        assert [json.loads(line)["message"] for line in lines if line][:2] == ["full", "printed"]
    else:
        said = run("pretty", stderr=subprocess.PIPE).stderr
        assert "[warning" in said and "\nprinted\n" in said and not said.startswith("{")


@pytest.mark.parametrize("form", ["json", "pretty"])
def test_a_log_that_nobody_reads_stops_nothing(form: str) -> None:
    """A process whose stderr is a broken pipe goes on at its work, and so does one on a disk that is full."""
    reads, writes = os.pipe()
    os.close(reads)
    assert run(form, stderr=writes).stdout == "alive\n"
    os.close(writes)
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        assert run(form, stderr=full).stdout == "alive\n"


def test_no_terminal_obeys_what_a_stranger_sent() -> None:
    """No field, message or exception of a line for a person has a character that a terminal obeys, nor another line."""
    evil = "/\x1b]0;x\x07\r\n\x7f\x9b\u202e"
    try:
        raise ValueError(evil)
    except ValueError:
        error = sys.exc_info()
    record = logging.LogRecord("a", logging.INFO, "", 0, "%s", (evil,), error)
    vars(record).update(path=evil, paths=[evil], where=Path(evil), why=ValueError(evil))
    line = re.sub(r"\x1b\[[\d;]*m", "", logs.formatter("pretty").format(record))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", line), repr(line)
    assert line.partition("\n")[0].count(r"\x1b]0;x") == 5 and r"\x1b]0;x" in line.partition("\n")[2]
