"""Structured logs: one JSON object a line, with the request id and without prompts."""

from __future__ import annotations

import json
import logging
import os
import sys

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


def install(level: str) -> None:
    """Send all logging of this process to stderr in this form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for quiet in ("alembic", "httpx", "uvicorn.access"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
