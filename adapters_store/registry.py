"""Tenants, tasks, versions, routes and usage, in SQL (SQLite by default).

A task exists while it has a version. Versions are immutable and numbered per task; a number is never given twice. The
last row of `routes` of a task is its route; the rows before it are its history. All calls are synchronous.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    insert,
    select,
    update,
)

from adapters_store.artifact import PromptFormat
from adapters_store.errors import AbsentError

DEFAULT_TENANT = "default"
metadata = MetaData()
tasks = Table(
    "tasks",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("name", String(63), nullable=False),
    Column("next_number", Integer, nullable=False),
    UniqueConstraint("tenant", "name"),
)
versions = Table(
    "versions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("task_id", ForeignKey("tasks.id"), nullable=False, index=True),
    Column("number", Integer, nullable=False),
    Column("digest", String(64), nullable=False, index=True),
    Column("method", String(40), nullable=False),
    Column("num_parameters", Integer, nullable=False),
    Column("num_bytes", Integer, nullable=False),
    Column("prompt_format", JSON, nullable=True),
    Column("note", String(1000), nullable=False),
    Column("created", Float, nullable=False),
    UniqueConstraint("task_id", "number"),
    UniqueConstraint("task_id", "digest"),
)
routes = Table(
    "routes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("task_id", ForeignKey("tasks.id"), nullable=False, index=True),
    Column("weights", JSON, nullable=False),  # {version number as text: weight}
    Column("created", Float, nullable=False),
)
usage = Table(
    "usage",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("task", String(63), nullable=False),
    Column("version", Integer, nullable=False),
    Column("requests", Integer, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    UniqueConstraint("tenant", "task", "version"),
)


@dataclass(frozen=True)
class Version:
    """One immutable version of a task."""

    task: str
    number: int
    digest: str
    method: str
    num_parameters: int
    num_bytes: int
    prompt_format: PromptFormat | None
    note: str
    created: float


@dataclass(frozen=True)
class Task:
    """A tenant's name, its versions in order, and its route {version: weight}."""

    name: str
    versions: tuple[Version, ...]
    route: dict[int, float]


@dataclass(frozen=True)
class Usage:
    """What a task's version (0: the base) was used for."""

    task: str
    version: int
    requests: int
    prompt_tokens: int
    completion_tokens: int


class Registry:
    """The registry at a database URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine: Engine | None = None

    def open(self) -> Registry:
        """Connect and migrate to the newest schema."""
        self._engine = create_engine(self.url)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _tune_sqlite)
        with self._begin() as connection:
            migrate(connection)
        return self

    def close(self) -> None:
        """Give the connections back."""
        if self._engine is not None:
            self._engine.dispose()

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        if self._engine is None:
            raise RuntimeError("the registry is not open")
        with self._engine.begin() as connection:
            yield connection

    def add_version(
        self,
        tenant: str,
        task: str,
        *,
        digest: str,
        method: str,
        num_parameters: int,
        num_bytes: int,
        prompt_format: PromptFormat | None = None,
        note: str = "",
        activate: bool = True,
    ) -> tuple[Version, bool]:
        """Add a version, and route to it unless told not to; durable on return.

        The same digest again is the same version: then the second item is False and its route is left alone.
        """
        with self._begin() as connection:
            task_id = self._task_id(connection, tenant, task, make=True)
            known = select(versions).where(versions.c.task_id == task_id, versions.c.digest == digest)
            if (row := connection.execute(known).first()) is not None:
                return _version(task, row), False
            number = connection.execute(select(tasks.c.next_number).where(tasks.c.id == task_id)).scalar_one()
            connection.execute(update(tasks).where(tasks.c.id == task_id).values(next_number=number + 1))
            values = {
                "task_id": task_id,
                "number": number,
                "digest": digest,
                "method": method,
                "num_parameters": num_parameters,
                "num_bytes": num_bytes,
                "prompt_format": None if prompt_format is None else msgspec.to_builtins(prompt_format),
                "note": note,
                "created": time.time(),
            }
            connection.execute(insert(versions).values(**values))
            if activate:
                self._set_route(connection, task_id, {number: 100})
            return _version(task, connection.execute(known).one()), True

    def resolve(self, tenant: str, task: str, version: int | None = None) -> Version:
        """The version that a request for a task gets now. Raises `AbsentError`."""
        found = self.task(tenant, task)
        if version is None:
            if not found.route:
                raise AbsentError(f"task {task} has no version in its route: name a version, or route to one")
            version = max(found.route, key=lambda number: (found.route[number], number))
        for candidate in found.versions:
            if candidate.number == version:
                return candidate
        raise AbsentError(f"task {task} has no version {version}")

    def task(self, tenant: str, task: str) -> Task:
        """A task with its versions and route. Raises `AbsentError`."""
        with self._begin() as connection:
            task_id = self._task_id(connection, tenant, task)
            return self._task(connection, task_id, task)

    def tasks(self, tenant: str) -> list[Task]:
        """All tasks of a tenant, by name."""
        has_version = select(versions.c.id).where(versions.c.task_id == tasks.c.id).exists()
        with self._begin() as connection:
            query = select(tasks).where(tasks.c.tenant == tenant, has_version).order_by(tasks.c.name)
            return [self._task(connection, row.id, row.name) for row in connection.execute(query).all()]

    def delete_task(self, tenant: str, task: str) -> list[str]:
        """Remove a task with all versions; their digests. Raises `AbsentError`."""
        with self._begin() as connection:
            task_id = self._task_id(connection, tenant, task)
            gone = [version.digest for version in self._task(connection, task_id, task).versions]
            connection.execute(delete(versions).where(versions.c.task_id == task_id))
            connection.execute(delete(routes).where(routes.c.task_id == task_id))
            return gone

    def delete_version(self, tenant: str, task: str, number: int) -> str:
        """Remove a version, also from the route; its digest. Raises `AbsentError`."""
        with self._begin() as connection:
            task_id = self._task_id(connection, tenant, task)
            found = self._task(connection, task_id, task)
            for version in found.versions:
                if version.number == number:
                    connection.execute(
                        delete(versions).where(versions.c.task_id == task_id, versions.c.number == number)
                    )
                    if number in found.route:
                        left = {other: weight for other, weight in found.route.items() if other != number}
                        self._set_route(connection, task_id, left)
                    return version.digest
            raise AbsentError(f"task {task} has no version {number}")

    def digests(self) -> set[str]:
        """Every digest that some version refers to."""
        with self._begin() as connection:
            return set(connection.execute(select(versions.c.digest)).scalars())

    def add_usage(
        self, tenant: str, task: str, version: int, *, requests: int, prompt_tokens: int, completion_tokens: int
    ) -> None:
        """Count what a request used; version 0 is the base."""
        key = (usage.c.tenant == tenant) & (usage.c.task == task) & (usage.c.version == version)
        counts = {"requests": requests, "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        with self._begin() as connection:
            grown = {name: usage.c[name] + count for name, count in counts.items()}
            if not connection.execute(update(usage).where(key).values(**grown)).rowcount:
                connection.execute(insert(usage).values(tenant=tenant, task=task, version=version, **counts))

    def usage(self, tenant: str) -> list[Usage]:
        """What a tenant used, by task and version."""
        with self._begin() as connection:
            query = select(usage).where(usage.c.tenant == tenant).order_by(usage.c.task, usage.c.version)
            return [
                Usage(row.task, row.version, row.requests, row.prompt_tokens, row.completion_tokens)
                for row in connection.execute(query).all()
            ]

    def _task_id(self, connection: Connection, tenant: str, task: str, make: bool = False) -> int:
        key = (tasks.c.tenant == tenant) & (tasks.c.name == task)
        task_id = connection.execute(select(tasks.c.id).where(key)).scalar()
        if task_id is None and make:
            connection.execute(insert(tasks).values(tenant=tenant, name=task, next_number=1))
            task_id = connection.execute(select(tasks.c.id).where(key)).scalar_one()
        if task_id is None:
            raise AbsentError(f"there is no task {task}")
        return int(task_id)

    def _task(self, connection: Connection, task_id: int, name: str) -> Task:
        ordered = select(versions).where(versions.c.task_id == task_id).order_by(versions.c.number)
        rows = connection.execute(ordered).all()
        if not rows:
            raise AbsentError(f"there is no task {name}")
        last = select(routes.c.weights).where(routes.c.task_id == task_id).order_by(routes.c.id.desc()).limit(1)
        weights = connection.execute(last).scalar() or {}
        route = {int(number): weight for number, weight in weights.items()}
        return Task(name, tuple(_version(name, row) for row in rows), route)

    def _set_route(self, connection: Connection, task_id: int, weights: dict[int, float]) -> None:
        named = {str(number): weight for number, weight in weights.items()}
        connection.execute(insert(routes).values(task_id=task_id, weights=named, created=time.time()))


def migrate(connection: Connection) -> None:
    """Bring a database to the newest schema (alembic; the scripts are in `migrations/`)."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _tune_sqlite(connection: Any, _record: Any) -> None:
    """Readers beside a writer; a commit is durable; references hold."""
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def _version(task: str, row: Row[Any]) -> Version:
    return Version(
        task=task,
        number=row.number,
        digest=row.digest,
        method=row.method,
        num_parameters=row.num_parameters,
        num_bytes=row.num_bytes,
        prompt_format=None if row.prompt_format is None else msgspec.convert(row.prompt_format, PromptFormat),
        note=row.note,
        created=row.created,
    )
