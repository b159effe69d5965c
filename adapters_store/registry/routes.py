"""Split a task's requests over its versions by a route, and keep the routes' history in SQL.

The last row of `routes` of a task is its route; a rollback returns to earlier rows.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select

from adapters_store.errors import AbsentError, NoEarlierRouteError
from adapters_store.registry import audit
from adapters_store.registry.database import routes, tasks, versions

FULL_ROUTE = 100.0  # weight of the only version of a route
MAX_HISTORY = 100  # routes kept per task
RESOLUTION = 2**53  # steps in [0, 1)


@dataclass(frozen=True)
class Route:
    """Weights by version number, and the key that keeps a request on its version: "user", or None for random."""

    weights: dict[int, float] = field(default_factory=dict)
    sticky: str | None = None

    def choose(self, place: float) -> int | None:
        """Return the version at a point of [0, 1), or None for an empty route.

        Versions split the interval in their order, by weight: a user on the newest version stays there while it grows.
        """
        numbers = sorted(self.weights)
        ends = list(accumulate(self.weights[number] for number in numbers))
        return next((number for number, end in zip(numbers, ends, strict=True) if place * ends[-1] < end), None)

    def place(self, tenant: str, task: str, user: str | None) -> float:
        """Return a request's point of [0, 1): by hash of tenant, task and user if the route is sticky, else random."""
        if self.sticky is None or user is None:
            return secrets.randbelow(RESOLUTION) / RESOLUTION
        words = (word.encode() for word in (tenant, task, user))
        framed = b"".join(len(word).to_bytes(4, "big") + word for word in words)
        return int.from_bytes(hashlib.sha256(framed).digest()[:8], "big") % RESOLUTION / RESOLUTION

    def is_like(self, other: Route) -> bool:
        """Tell if requests are split in the same way: only the proportions of weights count."""
        return self.sticky == other.sticky and self._shares() == other._shares()

    def _shares(self) -> dict[int, float]:
        whole = sum(self.weights.values())
        return {number: weight / whole for number, weight in self.weights.items()}

    def without(self, gone: set[int]) -> Route:
        """Return the route without some versions."""
        return Route({number: weight for number, weight in self.weights.items() if number not in gone}, self.sticky)


def current_route(connection: Connection, task_id: int) -> Route:
    """Return a task's route, which is empty if none was set."""
    row = connection.execute(_newest_first(task_id).limit(1)).first()
    return Route() if row is None else route_of(row)


def set_route(connection: Connection, task_id: int, route: Route) -> None:
    """Set a task's route; an equal route is not added again, so that a rollback leads to another one.

    Raises `AbsentError` for a version that the task does not have.
    """
    missing = route.weights.keys() - _numbers(connection, task_id)
    if missing:
        raise AbsentError(f"task {_name(connection, task_id)[1]} has no version {min(missing)}")
    if route != current_route(connection, task_id):
        _append(connection, task_id, route, "route.set")


def roll_back(connection: Connection, task_id: int) -> Route:
    """Return to the previous route, less versions deleted since; repeated calls go further back.

    Raises `NoEarlierRouteError`.
    """
    now, kept = current_route(connection, task_id), _numbers(connection, task_id)
    for row in connection.execute(_newest_first(task_id).offset(1)).all():
        stored = route_of(row)
        route = stored.without(stored.weights.keys() - kept)
        if route.weights and not route.is_like(now):
            connection.execute(delete(routes).where(routes.c.task_id == task_id, routes.c.id >= row.id))
            _append(connection, task_id, route, "route.rollback")
            return route
    raise NoEarlierRouteError(f"task {_name(connection, task_id)[1]} has no earlier route to go back to")


def route_of(row: Row[Any]) -> Route:
    """Convert a row of `routes` to a route."""
    return Route({int(number): weight for number, weight in row.weights.items()}, row.sticky)


def _append(connection: Connection, task_id: int, route: Route, action: str) -> None:
    named = {str(number): weight for number, weight in route.weights.items()}
    values = {"task_id": task_id, "weights": named, "sticky": route.sticky, "created": time.time()}
    connection.execute(insert(routes).values(**values))
    oldest = select(routes.c.id).where(routes.c.task_id == task_id).order_by(routes.c.id.desc()).offset(MAX_HISTORY)
    last = connection.execute(oldest.limit(1)).scalar()
    if last is not None:
        connection.execute(delete(routes).where(routes.c.task_id == task_id, routes.c.id <= last))
    tenant, task = _name(connection, task_id)
    audit.note(connection, tenant, action, task=task, versions=named, sticky=route.sticky)


def _newest_first(task_id: int) -> Any:
    return select(routes).where(routes.c.task_id == task_id).order_by(routes.c.id.desc())


def _numbers(connection: Connection, task_id: int) -> set[int]:
    return set(connection.execute(select(versions.c.number).where(versions.c.task_id == task_id)).scalars())


def _name(connection: Connection, task_id: int) -> tuple[str, str]:
    tenant, task = connection.execute(select(tasks.c.tenant, tasks.c.name).where(tasks.c.id == task_id)).one()
    return tenant, task
