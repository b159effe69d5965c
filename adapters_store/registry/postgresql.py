"""Limit PostgreSQL's connections in time: a server that hangs answers nothing, and keeps its connections open."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

CALL_WITHIN_S = 5  # of connecting, and of the answer to one statement


class LimitedConnection(psycopg.Connection[Any]):
    """A connection that waits at most `limit_s` seconds for an answer (None: for ever), and is closed if it is late."""

    limit_s: float | None = CALL_WITHIN_S

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Wait for an answer. Raises `psycopg.OperationalError` if it is late."""
        try:
            return super().wait(gen, interval, self.limit_s if timeout is None else timeout)
        except psycopg.OperationalError:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                self.close()  # nothing more can be asked before the answer is here
            raise


def connect(_dialect: Any, _record: Any, arguments: Any, options: dict[str, Any]) -> LimitedConnection:
    """Connect as SQLAlchemy's event `do_connect` asks for it."""
    return LimitedConnection.connect(*arguments, connect_timeout=CALL_WITHIN_S, **options)
