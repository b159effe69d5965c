"""Store tasks, versions, routes and usage in SQL (SQLite by default).

A task exists while it has a version. Versions are immutable and numbered per task; a number is never reused. All calls
are synchronous, and raise `OSError` or `RegistryDownError` if the database fails (`database.transaction`).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Select,
    Update,
    delete,
    func,
    insert,
    select,
    true,
    tuple_,
    update,
)

from adapters_store.errors import AbsentError, RegistryDownError, StoreError
from adapters_store.registry import audit
from adapters_store.registry.database import (
    POSTGRESQL,
    allow_writes_of,
    connect,
    ensure_owner,
    hold,
    identity,
    is_alive,
    migrate,
    removed,
    routes,
    sqlite_file,
    tasks,
    tenants,
    transaction,
    usage,
    versions,
)
from adapters_store.registry.records import Facts, Task, Usage, Version, usage_of, version_of
from adapters_store.registry.routes import FULL_ROUTE, Route, current_route, roll_back, route_of, set_route
from adapters_store.registry.tenants import check_quota

__all__ = ["Facts", "Registry", "Task", "Usage", "UsageKey", "Version"]
MAX_NUMBER = 2**63  # the end of SQL's integers
UsageKey = tuple[str, str, int]  # tenant, task, version (0: the base)


class Registry:
    """The tasks, versions, routes and usage in the database at a URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine: Engine | None = None
        self._held: Connection | None = None
        self._server = uuid.uuid4().hex
        self._checking = threading.Lock()

    @property
    def file(self) -> Path | None:
        """Return SQLite's file, which the server is to lock; None for PostgreSQL, which `open` locks."""
        return sqlite_file(self.url)

    def open(self) -> Registry:
        """Connect, and migrate to the newest schema. Raises `StoreError` if the database cannot be used."""
        self._engine = connect(self.url)
        try:
            self._held = hold(self._engine)
        except RegistryDownError as error:
            self._engine.dispose()
            raise StoreError(str(error)) from None
        with self._write() as connection:
            migrate(connection)
        allow_writes_of(self._engine, self._server)
        return self

    def check(self) -> None:
        """Claim the database again if the connection that holds it was cut, as by a restart of PostgreSQL.

        Raises `RegistryDownError` if the database does not answer, and `RegistryHeldError` if another server has it.
        """
        with self._checking:
            with self._read() as connection:
                connection.execute(select(identity.c.id))
                if self.engine.dialect.name == POSTGRESQL:
                    ensure_owner(connection, self._server)
            if self._held is not None and not is_alive(self._held):
                self._held.close()
                self._held = None
            if self._held is None:
                self._held = hold(self.engine)

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
            version = version_of(task, connection.execute(same_bytes).one())
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
            pinned = self._tasks(connection, tasks.c.is_pinned, max_versions=0)
        routed = [version for task in pinned for version in task.versions if version.number in task.route.weights]
        return list(dict.fromkeys(v.digest for v in sorted(routed, key=lambda v: v.created, reverse=True)))

    def task(self, tenant: str, task: str, before: int | None = None, max_versions: int | None = None) -> Task:
        """Return a task with its route, and the newest of its versions (below `before`). Raises `AbsentError`."""
        with self._read() as connection:
            task_id = self._task_id(connection, tenant, task)
            (task_found,) = self._tasks(connection, tasks.c.id == task_id, before, max_versions)
            return task_found

    def tasks(
        self, tenant: str, after: str | None = None, max_tasks: int | None = None, max_versions: int | None = None
    ) -> list[Task]:
        """Return a tenant's tasks by name, from the one `after` a name on, each with its newest versions."""
        page = select(tasks.c.id).where(tasks.c.tenant == tenant, _HAS_VERSION)
        if after is not None:
            page = page.where(tasks.c.name > after)
        with self._read() as connection:
            ids = connection.execute(page.order_by(tasks.c.name).limit(max_tasks)).scalars().all()
            return self._tasks(connection, tasks.c.id.in_(ids), None, max_versions)

    def task_names(
        self, tenant: str, after: str | None = None, max_tasks: int | None = None
    ) -> list[tuple[str, float]]:
        """Return a tenant's tasks by name, from the one `after` a name on, each with when its last version was made."""
        query = select(tasks.c.name, func.max(versions.c.created)).join(versions, versions.c.task_id == tasks.c.id)
        query = query.where(tasks.c.tenant == tenant).group_by(tasks.c.name).order_by(tasks.c.name).limit(max_tasks)
        if after is not None:
            query = query.where(tasks.c.name > after)
        with self._read() as connection:
            return [(name, created) for name, created in connection.execute(query).all()]

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
        """Return this registry's own identity, drawn at the first `open`: an artifact store belongs to one registry."""
        with self._read() as connection:
            return str(connection.execute(select(identity.c.id)).scalar_one())

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
        """Return every digest that a version refers to.

        It waits its turn as a writer, so that what is deleted by it is not what another change is about to refer to.
        """
        with self._write() as connection:
            return set(connection.execute(select(versions.c.digest)).scalars())

    def add_usages(self, counts: Mapping[tuple[str, str, int], Sequence[int]]) -> None:
        """Add to the usage: {(tenant, task, version): (requests, prompt tokens, completion tokens)}; all or none."""
        with self._write() as connection:
            for (tenant, task, version), numbers in counts.items():
                key = (usage.c.tenant == tenant) & (usage.c.task == task) & (usage.c.version == version)
                more = dict(zip(("requests", "prompt_tokens", "completion_tokens"), numbers, strict=True))
                grown, now = {name: usage.c[name] + count for name, count in more.items()}, time.time()
                if not connection.execute(update(usage).where(key).values(**grown, last=now)).rowcount:
                    row = {"tenant": tenant, "task": task, "version": version, **more, "last": now}
                    connection.execute(insert(usage).values(row))

    def usage(self, tenant: str, of: Collection[tuple[str, int]] | None = None) -> list[Usage]:
        """Return a tenant's usage by task and version: all of it, or that of the (task, version) that are named."""
        query = select(usage).where(usage.c.tenant == tenant).order_by(usage.c.task, usage.c.version)
        if of is not None:
            query = query.where(tuple_(usage.c.task, usage.c.version).in_(of))
        with self._read() as connection:
            return [usage_of(row) for row in connection.execute(query)]

    def forget_usage(self, before: float) -> int:
        """Delete the usage of what is gone, if it was last used before a Unix time; returns how many rows.

        Gone are deleted versions, those of deleted tasks and tenants too, and the base for a deleted tenant.
        """
        is_its_task = (tasks.c.tenant == usage.c.tenant) & (tasks.c.name == usage.c.task)
        is_its_version = (versions.c.task_id == tasks.c.id) & (versions.c.number == usage.c.version)
        has_version = select(versions.c.id).where(is_its_task, is_its_version).exists()
        its_tenant = select(tenants.c.name).where(tenants.c.name == usage.c.tenant, tenants.c.deleted.is_(None))
        is_there = has_version | ((usage.c.version == 0) & its_tenant.exists())
        with self._write() as connection:
            return connection.execute(delete(usage).where(usage.c.last < before, ~is_there)).rowcount

    def usages(
        self, tenant: str | None = None, after: UsageKey | None = None, max_rows: int | None = None
    ) -> list[tuple[str, Usage]]:
        """Return usage with its tenant, in order of their keys: of all tenants, deleted ones too, or of one."""
        key = (usage.c.tenant, usage.c.task, usage.c.version)
        query = select(usage).order_by(*key).limit(max_rows)
        query = query if tenant is None else query.where(usage.c.tenant == tenant)
        query = query if after is None else query.where(tuple_(*key) > after)
        with self._read() as connection:
            return [(row.tenant, usage_of(row)) for row in connection.execute(query)]

    def _task_id(self, connection: Connection, tenant: str, task: str) -> int:
        query = select(tasks.c.id).where(tasks.c.tenant == tenant, tasks.c.name == task, _HAS_VERSION)
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
        return version_of(task, row)

    def _tasks(
        self,
        connection: Connection,
        which: ColumnElement[bool],
        before: int | None = None,
        max_versions: int | None = None,
    ) -> list[Task]:
        """Read tasks with their routes and versions (see `Task`), in three queries however many there are."""
        last = select(func.max(routes.c.id)).join(tasks, routes.c.task_id == tasks.c.id).where(which)
        newest = select(routes).where(routes.c.id.in_(last.group_by(routes.c.task_id)))
        route_by_task = {row.task_id: route_of(row) for row in connection.execute(newest).all()}
        newest_ids = _newest(which, before, max_versions) if max_versions is not None else None
        is_newest = true() if newest_ids is None else versions.c.id.in_(newest_ids)
        of_task = versions.join(tasks, versions.c.task_id == tasks.c.id)
        counted = select(versions.c.task_id, func.count()).select_from(of_task).where(which)
        counts = {row[0]: int(row[1]) for row in connection.execute(counted.group_by(versions.c.task_id)).all()}
        columns = (tasks.c.name, tasks.c.is_pinned, versions, is_newest.label("is_newest"))
        ordered = select(*columns).select_from(of_task).where(which).order_by(tasks.c.name, versions.c.number)
        numbers = {number for route in route_by_task.values() for number in route.weights}
        rows = connection.execute(ordered.where(is_newest | versions.c.number.in_(numbers))).all()
        found = []
        for (name, is_pinned, task_id), group in groupby(rows, lambda row: (row.name, row.is_pinned, row.task_id)):
            route = route_by_task.get(task_id, Route())
            shown = tuple(version_of(name, row) for row in group if row.is_newest or row.number in route.weights)
            found.append(Task(name, shown, route, is_pinned, counts[task_id]))
        return found

    def _remember(self, connection: Connection, task_id: int, digests: Iterable[str]) -> None:
        """Record deleted versions, so that an import does not add them again."""
        for digest in digests:
            connection.execute(insert(removed).values(task_id=task_id, digest=digest))

    def _next_number(self, connection: Connection, task_id: int) -> int:
        """Draw a version number that this task never had."""
        number = connection.execute(select(tasks.c.next_number).where(tasks.c.id == task_id)).scalar_one()
        connection.execute(update(tasks).where(tasks.c.id == task_id).values(next_number=number + 1))
        return int(number)


_HAS_VERSION = select(versions.c.id).where(versions.c.task_id == tasks.c.id).exists()


def _newest(which: ColumnElement[bool], before: int | None, max_versions: int) -> Select[Any]:
    """Return a query for the ids of each task's newest versions, below a number."""
    place = func.row_number().over(partition_by=versions.c.task_id, order_by=versions.c.number.desc())
    is_below = true() if before is None else versions.c.number < before
    placed = select(versions.c.id, place.label("place")).join(tasks, versions.c.task_id == tasks.c.id)
    page = placed.where(which, is_below).subquery()
    return select(page.c.id).where(page.c.place <= max_versions)


def _set_validated(digest: str, fingerprint: str) -> Update:
    return update(versions).where(versions.c.digest == digest).values(proved=fingerprint)
