"""The log of changes: who changed what, and when. A line is written in the transaction of its change, or not at all.

Who acts is a context variable, so that no change can be made without a name: whoever lets a request in says `acting`,
and threads that `asyncio.to_thread` starts know it, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, select

from adapters_store.registry.database import audit


@dataclass(frozen=True)
class Actor:
    """Who acts: `server` itself, `local` (no key is asked for), `admin`, or the id of a key."""

    name: str = "server"
    request_id: str | None = None


@dataclass(frozen=True)
class AuditEntry:
    """One change. `what` names what was changed, in the words of its action."""

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
    """From now on in this context changes are made by this actor."""
    _ACTOR.set(Actor(name, request_id))


@contextmanager
def acting(name: str, request_id: str | None = None) -> Iterator[None]:
    """While the block runs changes are made by this actor."""
    token = _ACTOR.set(Actor(name, request_id))
    try:
        yield
    finally:
        _ACTOR.reset(token)


def note(connection: Connection, tenant: str, action: str, **what: Any) -> None:
    """Write a line of a change that is made in this transaction."""
    actor = _ACTOR.get()
    values = {"actor": actor.name, "request_id": actor.request_id, "tenant": tenant, "action": action, "what": what}
    connection.execute(insert(audit).values(at=time.time(), **values))


def entries(connection: Connection, tenant: str | None, before: int | None, max_entries: int) -> list[AuditEntry]:
    """The newest changes first: of one tenant or of all, those with a number under `before`."""
    query = select(audit).order_by(audit.c.id.desc()).limit(max_entries)
    if tenant is not None:
        query = query.where(audit.c.tenant == tenant)
    if before is not None:
        query = query.where(audit.c.id < before)
    return [AuditEntry(*row) for row in connection.execute(query).all()]
