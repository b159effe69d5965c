"""Structured logs: one JSON object a line, with the request id and without prompts."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any, cast

from rich.console import Console

log = logging.getLogger(__name__)


EVERY_S = 60.0  # between two lines of one cause
_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonLines(logging.Formatter):
    """Formats a record as a JSON line: time, level, logger, message, pid, and the fields of `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as a JSON line."""
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name}
        line |= {"message": record.getMessage(), "pid": os.getpid()}
        line |= {name: value for name, value in vars(record).items() if name not in _KNOWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class PrintedLines(io.TextIOBase):
    """Writes what is printed to stderr as the log is written, a record a line: all of it can be read as JSON."""

    def __init__(self) -> None:
        self._begun = ""

    def write(self, text: str) -> int:
        """Write the lines that are complete now, but for empty ones."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in filter(str.strip, lines):
            record = log.makeRecord(log.name, logging.INFO, __file__, 0, line, (), None)
            sys.stderr.write(JsonLines().format(record) + "\n")
        return len(text)


def console() -> Console:
    """Make a console on stderr: it prints for a person at a terminal, and logs elsewhere."""
    return Console(stderr=True) if sys.stderr.isatty() else Console(file=cast("IO[str]", PrintedLines()))


def cause_of(error: BaseException, **more: object) -> dict[str, object]:
    """The `extra` of a line about a fault that may meet every request, so that `OncePerMinute` bounds such lines."""
    number = getattr(error, "errno", None)
    return {"reason": str(error) or type(error).__name__, "cause": f"{type(error).__name__} {number}", **more}


class OncePerMinute(logging.Filter):
    """Lets a line with a `cause` pass once a minute, by its logger and message; it says how many were left out before.

    Without it a full disk would be filled with lines that say so.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._told: dict[tuple[str, str, str], tuple[float, int]] = {}  # when each was let pass, and how many not since

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell if a record passes."""
        if not hasattr(record, "cause"):
            return True
        key = record.name, str(record.msg), str(record.cause)
        told_at, num_left_out = self._told.get(key, (-EVERY_S, 0))
        if (now := self._clock()) < told_at + EVERY_S:
            self._told[key] = told_at, num_left_out + 1
            return False
        self._told[key] = now, 0
        record.left_out = num_left_out
        return True


def install(level: str) -> None:
    """Send all logging of this process to stderr in this form; so also warnings, and exceptions that end a thread."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    handler.addFilter(OncePerMinute())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = lambda *error: _log_uncaught(error)
    threading.excepthook = lambda uncaught: _log_uncaught(uncaught[:3])
    for quiet in ("alembic", "httpx2", "uvicorn.access"):
        logging.getLogger(quiet).setLevel(logging.WARNING)


def _log_uncaught(error: Any) -> None:
    log.critical("an exception was not caught", exc_info=tuple(error))
