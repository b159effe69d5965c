"""Log every change: its actor, action and time, written in the transaction of the change or not at all.

The actor is a context variable, so that no change is made without one: the code that accepts a request calls `acting`,
and threads started by `asyncio.to_thread` inherit it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from adapters_store.registry.database import audit


@dataclass(frozen=True)
class Actor:
    """The actor of a change: `server` itself, `local` (no key is required), `admin`, or the id of a key."""

    name: str = "server"
    request_id: str | None = None


@dataclass(frozen=True)
class AuditEntry:
    """A change. `what` names what was changed, with keys that depend on `action`; `at` is in Unix seconds."""

    number: int
    at: float
    actor: str
    tenant: str
    action: str
    what: dict[str, Any]
    request_id: str | None


_SERVER = Actor()
_ACTOR: ContextVar[Actor] = ContextVar("actor", default=_SERVER)


def act_as(name: str, request_id: str | None = None) -> None:
    """Set the actor of changes for the rest of this context."""
    _ACTOR.set(Actor(name, request_id))


@contextmanager
def acting(name: str, request_id: str | None = None) -> Iterator[None]:
    """Set the actor of changes within the block."""
    token = _ACTOR.set(Actor(name, request_id))
    try:
        yield
    finally:
        _ACTOR.reset(token)


def note(connection: Connection, tenant: str, action: str, **what: Any) -> None:
    """Add an entry for a change to the change's own transaction."""
    actor = _ACTOR.get()
    values = {"actor": actor.name, "request_id": actor.request_id, "tenant": tenant, "action": action, "what": what}
    connection.execute(insert(audit).values(at=time.time(), **values))


def entries(connection: Connection, tenant: str | None, before: int | None, max_entries: int) -> list[AuditEntry]:
    """Return up to `max_entries` changes, newest first: of a tenant or (None) of all, with numbers below `before`."""
    query = select(audit).order_by(audit.c.id.desc()).limit(max_entries)
    if tenant is not None:
        query = query.where(audit.c.tenant == tenant)
    if before is not None:
        query = query.where(audit.c.id < before)
    return [AuditEntry(*row) for row in connection.execute(query).all()]


def forget(connection: Connection, before: float) -> int:
    """Delete the changes made before a Unix time; returns how many."""
    return connection.execute(delete(audit).where(audit.c.at < before)).rowcount
