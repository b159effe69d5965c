"""The log is JSON, line by line, whatever writes to it."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import logging, threading, warnings
from server import logs

logs.install("warning")
logging.getLogger("a.library").warning("one\\ntwo")
warnings.warn("old")
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
    assert [line.get("exception", "").rpartition("\n")[2] for line in lines][2::3] == [
        "ZeroDivisionError: division by zero",
        "ValueError: at last",
    ]
    assert said[3:5] == ["printed", "  and indented " + "x" * 300]
    assert all({"time", "level", "logger", "message", "pid"} <= line.keys() for line in lines)
