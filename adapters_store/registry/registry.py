"""Store tasks, versions, routes and usage in SQL (SQLite by default).

A task exists while it has a version. Versions are immutable and numbered per task; a number is never reused. All calls
are synchronous, and raise `OSError` or `RegistryDownError` if the database fails (`database.transaction`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, Engine, Row, Update, delete, func, insert, select, update

from adapters_store.errors import AbsentError, StoreError
from adapters_store.format.manifest import GenerationDefaults, PromptFormat
from adapters_store.registry import audit
from adapters_store.registry.database import (
    connect,
    hold,
    identity,
    migrate,
    removed,
    routes,
    tasks,
    transaction,
    usage,
    versions,
)
from adapters_store.registry.routes import FULL_ROUTE, Route, current_route, roll_back, route_of, set_route
from adapters_store.registry.tenants import DEFAULT_TENANT, check_quota

__all__ = ["DEFAULT_TENANT", "Facts", "Registry", "Task", "Usage", "Version"]
MAX_NUMBER = 2**63  # the end of SQL's integers


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The registry's record of an artifact's content.

    `num_parameters` were trained; `num_items` numbers are taken on the device, of which `num_matrix_items` are of
    matrices; `num_virtual` prefix tokens come before a prompt; `num_bytes` is the size of the files. An answer ends at
    the token ids `ends`, beside the base's.
    """

    digest: str
    method: str
    num_parameters: int
    num_items: int
    num_matrix_items: int
    num_virtual: int
    num_bytes: int
    prompt_format: PromptFormat | None = None
    ends: tuple[int, ...] = ()
    generation: GenerationDefaults | None = None


@dataclass(frozen=True, kw_only=True)
class Version(Facts):
    """An immutable version of a task; `created` is in Unix seconds."""

    task: str
    number: int
    note: str
    created: float


@dataclass(frozen=True)
class Task:
    """A tenant's task: versions by number, route, and whether the routed versions are pinned to the device."""

    name: str
    versions: tuple[Version, ...]
    route: Route
    is_pinned: bool = False


@dataclass(frozen=True)
class Usage:
    """The use of a task's version (0: the base): requests and tokens."""

    task: str
    version: int
    requests: int
    prompt_tokens: int
    completion_tokens: int


class Registry:
    """The tasks, versions, routes and usage in the database at a URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine: Engine | None = None
        self._held: Connection | None = None

    def open(self) -> Registry:
        """Connect, and migrate to the newest schema. Raises `StoreError` if the database cannot be used."""
        self._engine = connect(self.url)
        try:
            self._held = hold(self._engine)
        except StoreError:
            self._engine.dispose()
            raise
        with self._write() as connection:
            migrate(connection)
        return self

    def close(self) -> None:
        """Close the connections and release the database."""
        if self._held is not None:
            self._held.close()
        if self._engine is not None:
            self._engine.dispose()

    def _read(self) -> AbstractContextManager[Connection]:
        return transaction(self.engine, is_write=False)

    def _write(self) -> AbstractContextManager[Connection]:
        return transaction(self.engine, is_write=True)

    @property
    def engine(self) -> Engine:
        """Return the open database, which `Tenants` shares. Raises `RuntimeError` before `open`."""
        if self._engine is None:
            raise RuntimeError("the registry is not open")
        return self._engine

    def add_version(
        self,
        tenant: str,
        task: str,
        facts: Facts,
        *,
        note: str = "",
        activate: bool = True,
        validated: str | None = None,
    ) -> tuple[Version, bool]:
        """Add a version, and route to it if `activate`; durable on return. `validated`: as in `set_validated`.

        The same digest again is the same version, routed likewise; then the second item is False. Raises `QuotaError`
        if the tenant's limits are reached.
        """
        with self._write() as connection:
            task_id = self._make_task(connection, tenant, task)
            same_bytes = select(versions).where(versions.c.task_id == task_id, versions.c.digest == facts.digest)
            is_new = connection.execute(same_bytes).first() is None
            if is_new:
                check_quota(connection, tenant, facts.num_bytes)
                number = self._next_number(connection, task_id)
                values = {"task_id": task_id, "number": number, "note": note, "created": time.time()}
                connection.execute(insert(versions).values(**values, **msgspec.to_builtins(facts)))
                audit.note(connection, tenant, "version.add", task=task, version=number, digest=facts.digest)
            connection.execute(delete(removed).where(removed.c.task_id == task_id, removed.c.digest == facts.digest))
            version = _version(task, connection.execute(same_bytes).one())
            if validated is not None:
                connection.execute(_set_validated(facts.digest, validated))
            if activate:
                set_route(connection, task_id, Route({version.number: FULL_ROUTE}))
            return version, is_new

    def resolve(self, tenant: str, task: str, version: int | None = None, user: str | None = None) -> Version:
        """Choose the version for a request: the given one, or by the task's route; `user` is the key of a sticky route.

        Raises `AbsentError`.
        """
        with self._read() as connection:
            task_id = self._task_id(connection, tenant, task)
            route = Route({version: FULL_ROUTE}) if version is not None else current_route(connection, task_id)
            number = route.choose(route.place(tenant, task, user))
            if number is None:
                raise AbsentError(f"task {task} has no version in its route: name a version, or route to one")
            return self._find(connection, task_id, task, number)

    def set_route(self, tenant: str, task: str, route: Route) -> None:
        """Route a task's requests; durable on return. Raises `AbsentError` for a missing task or version."""
        with self._write() as connection:
            set_route(connection, self._task_id(connection, tenant, task), route)

    def roll_back(self, tenant: str, task: str) -> Route:
        """Return to the previous route. Raises `AbsentError` or `NoEarlierRouteError`."""
        with self._write() as connection:
            return roll_back(connection, self._task_id(connection, tenant, task))

    def set_pinned(self, tenant: str, task: str, is_pinned: bool) -> None:
        """Pin the versions that a task routes to on the device, or unpin them. Raises `AbsentError`."""
        with self._write() as connection:
            task_id = self._task_id(connection, tenant, task)
            which = (tasks.c.id == task_id) & (tasks.c.is_pinned != is_pinned)
            if connection.execute(update(tasks).where(which).values(is_pinned=is_pinned)).rowcount:
                audit.note(connection, tenant, "task.pin", task=task, pinned=is_pinned)

    def pinned_digests(self) -> list[str]:
        """Return the digests that pinned tasks of all tenants route to, the newest version first."""
        with self._read() as connection:
            pinned = self._tasks(connection, tasks.c.is_pinned)
        routed = [version for task in pinned for version in task.versions if version.number in task.route.weights]
        return list(dict.fromkeys(v.digest for v in sorted(routed, key=lambda v: v.created, reverse=True)))

    def task(self, tenant: str, task: str) -> Task:
        """Return a task with its versions and route. Raises `AbsentError`."""
        with self._read() as connection:
            self._task_id(connection, tenant, task)
            (task_found,) = self._tasks(connection, (tasks.c.tenant == tenant) & (tasks.c.name == task))
            return task_found

    def tasks(self, tenant: str) -> list[Task]:
        """Return a tenant's tasks, by name."""
        with self._read() as connection:
            return self._tasks(connection, tasks.c.tenant == tenant)

    def delete_task(self, tenant: str, task: str) -> list[str]:
        """Delete a task with all its versions, and return their digests. Raises `AbsentError`."""
        with self._write() as connection:
            task_id = self._task_id(connection, tenant, task)
            digests = connection.execute(select(versions.c.digest).where(versions.c.task_id == task_id)).scalars().all()
            self._remember(connection, task_id, digests)
            connection.execute(delete(versions).where(versions.c.task_id == task_id))
            connection.execute(delete(routes).where(routes.c.task_id == task_id))
            connection.execute(update(tasks).where(tasks.c.id == task_id).values(is_pinned=False))
            audit.note(connection, tenant, "task.delete", task=task, num_versions=len(digests))
            return list(digests)

    def delete_version(self, tenant: str, task: str, number: int) -> str:
        """Delete a version, also from the route, and return its digest. Raises `AbsentError`."""
        with self._write() as connection:
            task_id = self._task_id(connection, tenant, task)
            digest = self._find(connection, task_id, task, number).digest
            route = current_route(connection, task_id)
            set_route(connection, task_id, route.without({number}))
            self._remember(connection, task_id, [digest])
            which = (versions.c.task_id == task_id) & (versions.c.number == number)
            connection.execute(delete(versions).where(which))
            audit.note(connection, tenant, "version.delete", task=task, version=number, digest=digest)
            return digest

    def was_removed(self, tenant: str, task: str, digest: str) -> bool:
        """Tell if a version with these bytes was deleted, and not uploaded since."""
        query = select(removed.c.id).join(tasks, removed.c.task_id == tasks.c.id)
        with self._read() as connection:
            of_task = query.where(tasks.c.tenant == tenant, tasks.c.name == task, removed.c.digest == digest)
            return connection.execute(of_task).first() is not None

    def identity(self) -> str:
        """Return this registry's own identity, drawn once: an artifact store belongs to one registry."""
        with self._write() as connection:
            stored = connection.execute(select(identity.c.id)).scalar()
            if stored is None:
                stored = uuid.uuid4().hex
                connection.execute(insert(identity).values(id=stored))
            return str(stored)

    def set_validated(self, digest: str, fingerprint: str) -> None:
        """Record that all versions of these bytes passed validation; `fingerprint` names the base and the software."""
        with self._write() as connection:
            connection.execute(_set_validated(digest, fingerprint))

    def unvalidated(self, fingerprint: str) -> list[str]:
        """Return digests of versions last validated under another fingerprint, or never; the newest first."""
        query = select(versions.c.digest).where(func.coalesce(versions.c.proved, "") != fingerprint)
        with self._read() as connection:
            digests = connection.execute(query.order_by(versions.c.created.desc())).scalars()
            return list(dict.fromkeys(digests))

    def digests(self) -> set[str]:
        """Return every digest that a version refers to."""
        with self._read() as connection:
            return set(connection.execute(select(versions.c.digest)).scalars())

    def add_usages(self, counts: Mapping[tuple[str, str, int], Sequence[int]]) -> None:
        """Add to the usage: {(tenant, task, version): (requests, prompt tokens, completion tokens)}; all or none."""
        with self._write() as connection:
            for (tenant, task, version), numbers in counts.items():
                key = (usage.c.tenant == tenant) & (usage.c.task == task) & (usage.c.version == version)
                more = dict(zip(("requests", "prompt_tokens", "completion_tokens"), numbers, strict=True))
                grown = {name: usage.c[name] + count for name, count in more.items()}
                if not connection.execute(update(usage).where(key).values(**grown)).rowcount:
                    connection.execute(insert(usage).values(tenant=tenant, task=task, version=version, **more))

    def usage(self, tenant: str) -> list[Usage]:
        """Return a tenant's usage, by task and version."""
        return self.usages(tenant).get(tenant, [])

    def usages(self, tenant: str | None = None) -> dict[str, list[Usage]]:
        """Return the usage by tenant, deleted ones included, or of the named tenant only."""
        query = select(usage).order_by(usage.c.tenant, usage.c.task, usage.c.version)
        with self._read() as connection:
            rows = connection.execute(query if tenant is None else query.where(usage.c.tenant == tenant)).all()
        return {
            name: [
                Usage(row.task, row.version, row.requests, row.prompt_tokens, row.completion_tokens) for row in group
            ]
            for name, group in groupby(rows, lambda row: row.tenant)
        }

    def _task_id(self, connection: Connection, tenant: str, task: str) -> int:
        has_version = select(versions.c.id).where(versions.c.task_id == tasks.c.id).exists()
        query = select(tasks.c.id).where(tasks.c.tenant == tenant, tasks.c.name == task, has_version)
        task_id = connection.execute(query).scalar()
        if task_id is None:
            raise AbsentError(f"there is no task {task}")
        return int(task_id)

    def _make_task(self, connection: Connection, tenant: str, task: str) -> int:
        """Return the id of a task, which is created if it is new."""
        query = select(tasks.c.id).where(tasks.c.tenant == tenant, tasks.c.name == task)
        if connection.execute(query).scalar() is None:
            connection.execute(insert(tasks).values(tenant=tenant, name=task, next_number=1))
        return int(connection.execute(query).scalar_one())

    def _find(self, connection: Connection, task_id: int, task: str, number: int) -> Version:
        query = select(versions).where(versions.c.task_id == task_id, versions.c.number == number)
        row = connection.execute(query).first() if 0 < number < MAX_NUMBER else None
        if row is None:
            raise AbsentError(f"task {task} has no version {number}")
        return _version(task, row)

    def _tasks(self, connection: Connection, which: ColumnElement[bool]) -> list[Task]:
        """Read tasks with their versions and routes, in two queries however many there are."""
        columns = (tasks.c.name, tasks.c.is_pinned, versions)
        of_tasks = select(*columns).join(versions, versions.c.task_id == tasks.c.id).where(which)
        rows = connection.execute(of_tasks.order_by(tasks.c.tenant, tasks.c.name, versions.c.number)).all()
        last = select(func.max(routes.c.id)).join(tasks, routes.c.task_id == tasks.c.id).where(which)
        newest = select(routes).where(routes.c.id.in_(last.group_by(routes.c.task_id)))
        route_by_task = {row.task_id: route_of(row) for row in connection.execute(newest).all()}
        return [
            Task(name, tuple(_version(name, row) for row in group), route_by_task.get(task_id, Route()), is_pinned)
            for (name, is_pinned, task_id), group in groupby(rows, lambda row: (row.name, row.is_pinned, row.task_id))
        ]

    def _remember(self, connection: Connection, task_id: int, digests: Iterable[str]) -> None:
        """Record deleted versions, so that an import does not add them again."""
        for digest in digests:
            connection.execute(insert(removed).values(task_id=task_id, digest=digest))

    def _next_number(self, connection: Connection, task_id: int) -> int:
        """Draw a version number that this task never had."""
        number = connection.execute(select(tasks.c.next_number).where(tasks.c.id == task_id)).scalar_one()
        connection.execute(update(tasks).where(tasks.c.id == task_id).values(next_number=number + 1))
        return int(number)


def _set_validated(digest: str, fingerprint: str) -> Update:
    return update(versions).where(versions.c.digest == digest).values(proved=fingerprint)


def _version(task: str, row: Row[Any]) -> Version:
    columns = {field.name: getattr(row, field.name) for field in fields(Version) if field.name != "task"}
    return msgspec.convert({"task": task, **columns}, Version)
