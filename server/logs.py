"""Structured logs, with the request id and without prompts: for a person at a terminal, else one JSON object a line.

The code logs by `logging`, as the libraries do whose records go the same way; structlog writes the lines.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from typing import IO, Any, cast

import structlog
from rich.console import Console

from adapters_store.escapes import printable

log = logging.getLogger(__name__)


EVERY_S = 60.0  # between two lines of one cause
_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def formatter(form: str = "json") -> logging.Formatter:
    """Make what formats a record: time, level, logger, message, pid, and the fields of `extra`.

    `form` is `json`, `pretty` for a person, or `auto`, which is pretty at a terminal alone.
    """
    if not is_pretty(form):
        render: tuple[Any, ...] = structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)
    else:
        render = _for_a_person, _pretty()
    return structlog.stdlib.ProcessorFormatter(processors=(_fields, *render))


def is_pretty(form: str) -> bool:
    """Whether lines of this form are for a person."""
    return form == "pretty" or (form == "auto" and sys.stderr.isatty())


def _fields(_logger: Any, _level: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    """The fields of a record's line, in the order in which they are written."""
    record = event["_record"]
    line = {"time": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name}
    line |= {"message": event["event"], "pid": os.getpid()}
    line |= {name: value for name, value in vars(record).items() if name not in _KNOWN}
    return line | ({"exc_info": event["exc_info"]} if "exc_info" in event else {})


def _for_a_person(_logger: Any, _level: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The fields that a person reads: the time of day, and no process id; no terminal obeys what a stranger sent."""
    del line["pid"]
    line["time"] = time.strftime("%H:%M:%S", time.localtime(line["time"]))
    return {name: printable(value) if isinstance(value, str) else value for name, value in line.items()}


def _traceback(shown: IO[str], error: Any) -> None:
    """Write a traceback for a person. Others than this one show variables, so prompts and keys."""
    plain = io.StringIO()
    structlog.dev.plain_traceback(plain, error)
    shown.write(printable(plain.getvalue(), kept="\n\t"))


def _pretty() -> structlog.dev.ConsoleRenderer:
    shown = Console(stderr=True)  # it knows what the terminal can, and NO_COLOR
    return structlog.dev.ConsoleRenderer(
        colors=shown.color_system is not None and not shown.no_color,
        sort_keys=False,
        event_key="message",
        timestamp_key="time",
        exception_formatter=_traceback,
    )


class Stderr(io.TextIOBase):
    """Writes to stderr. Text for a full disk, or for a terminal that is gone, is lost, as log lines are."""

    def write(self, text: str) -> int:
        """Write a text, or lose it."""
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush stderr, or lose what was not written yet."""
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        """Whether stderr is a terminal."""
        return sys.stderr.isatty()


class PrintedLines(Stderr):
    """Writes what is printed to stderr as the log is written, a record a line: all of it can be read as JSON."""

    def __init__(self) -> None:
        self._begun, self._formatter = "", formatter()

    def write(self, text: str) -> int:
        """Write the lines that are complete now, but for empty ones."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in filter(str.strip, lines):
            record = log.makeRecord(log.name, logging.INFO, __file__, 0, line, (), None)
            super().write(self._formatter.format(record) + "\n")
        return len(text)


def console(form: str = "auto") -> Console:
    """Make a console on stderr: it prints for a person if the log is for one, and logs else."""
    return Console(file=cast("IO[str]", Stderr() if is_pretty(form) else PrintedLines()))


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


class Handler(logging.StreamHandler[Any]):
    """Writes records; if one cannot be formatted, a line that names its place."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - as logging calls it
        """Write that line instead of text; a stream that takes nothing is passed over, as `Stderr` does."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            return
        told = log.makeRecord(
            log.name, logging.ERROR, record.pathname, record.lineno, "a record of the log cannot be formatted", (), None
        )
        vars(told).update(of=record.name, where=f"{record.pathname}:{record.lineno}", reason=type(error).__name__)
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(self.format(told) + self.terminator)
            self.flush()


def install(level: str, form: str = "auto") -> None:
    """Send all logging of this process to stderr in a form; so also warnings, and exceptions that end a thread."""
    handler = Handler(sys.stderr)
    handler.setFormatter(formatter(form))
    handler.addFilter(OncePerMinute())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = lambda *error: _log_uncaught(error)
    threading.excepthook = lambda uncaught: _log_uncaught(uncaught[:3])
    sys.unraisablehook = lambda ignored: _log_uncaught((ignored.exc_type, ignored.exc_value, ignored.exc_traceback))
    for quiet in ("alembic", "httpx2", "uvicorn.access"):
        logging.getLogger(quiet).setLevel(logging.WARNING)


def _log_uncaught(error: Any) -> None:
    log.critical("an exception was not caught", exc_info=tuple(error))
