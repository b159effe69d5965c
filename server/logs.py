"""Structured logs: one JSON object a line, with the request id and without prompts."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from typing import IO, Any, cast

from rich.console import Console

log = logging.getLogger(__name__)

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


def install(level: str) -> None:
    """Send all logging of this process to stderr in this form; so also warnings, and exceptions that end a thread."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = lambda *error: _log_uncaught(error)
    threading.excepthook = lambda uncaught: _log_uncaught(uncaught[:3])
    for quiet in ("alembic", "httpx", "uvicorn.access"):
        logging.getLogger(quiet).setLevel(logging.WARNING)


def _log_uncaught(error: Any) -> None:
    log.critical("an exception was not caught", exc_info=tuple(error))
