"""The route of a task: which share of its requests each version gets; its history, in SQL.

The last row of `routes` of a task is its route; the rows before it are what a rollback goes back to.
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

FULL_ROUTE = 100.0  # the weight of a version that is the whole route
MAX_HISTORY = 100  # routes of a task that are kept
RESOLUTION = 2**53  # of a place on the line


@dataclass(frozen=True)
class Route:
    """{version: weight}, and what keeps a request with its version: its `user`, or nothing (None)."""

    weights: dict[int, float] = field(default_factory=dict)
    sticky: str | None = None

    def choose(self, place: float) -> int | None:
        """The version at a place of [0, 1): versions lie side by side in their order, each as long as it weighs.

        So whoever is sent to the newest version stays with it while its weight grows. None: the route is empty.
        """
        numbers = sorted(self.weights)
        ends = list(accumulate(self.weights[number] for number in numbers))
        return next((number for number, end in zip(numbers, ends, strict=True) if place * ends[-1] < end), None)

    def place(self, tenant: str, task: str, user: str | None) -> float:
        """Where a request stands: the same for the same user where the route is sticky, else anywhere."""
        if self.sticky is None or user is None:
            return secrets.randbelow(RESOLUTION) / RESOLUTION
        words = (word.encode() for word in (tenant, task, user))
        framed = b"".join(len(word).to_bytes(4, "big") + word for word in words)
        return int.from_bytes(hashlib.sha256(framed).digest()[:8], "big") % RESOLUTION / RESOLUTION

    def is_like(self, other: Route) -> bool:
        """Whether requests fall the same way: weights count in proportion alone."""
        return self.sticky == other.sticky and self._shares() == other._shares()

    def _shares(self) -> dict[int, float]:
        whole = sum(self.weights.values())
        return {number: weight / whole for number, weight in self.weights.items()}

    def without(self, gone: set[int]) -> Route:
        """The same route but for some versions."""
        return Route({number: weight for number, weight in self.weights.items() if number not in gone}, self.sticky)


def current_route(connection: Connection, task_id: int) -> Route:
    """A task's route; empty where it has none."""
    row = connection.execute(_newest_first(task_id).limit(1)).first()
    return Route() if row is None else route_of(row)


def set_route(connection: Connection, task_id: int, route: Route) -> None:
    """Route from now on; a route that is the same is not a new one, so that a rollback goes to another.

    Raises `AbsentError` for a version that the task does not have.
    """
    missing = route.weights.keys() - _numbers(connection, task_id)
    if missing:
        raise AbsentError(f"task {_name(connection, task_id)[1]} has no version {min(missing)}")
    if route != current_route(connection, task_id):
        _append(connection, task_id, route, "route.set")


def roll_back(connection: Connection, task_id: int) -> Route:
    """Return to the route before this one, less the versions that are gone since; asked again, to the one before that.

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
    """A route as its row has it."""
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
