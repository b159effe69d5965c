"""The registry's tables, and a connection to them: migrated to the newest schema, durable, one writer at a time.

SQLite by default; PostgreSQL by its URL.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    event,
    false,
    func,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from adapters_store.durable import fsync
from adapters_store.errors import RegistryDownError, StoreError

SQLITE, POSTGRESQL = "sqlite", "postgresql"
WRITER_LOCK, SERVER_LOCK = 0x6D616E79, 0x68617473  # advisory locks, of one database each
DISK_FAULTS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_READONLY: errno.EROFS,
}
IS_NAMED = "manyhats_is_named"  # of a connection that has written

metadata = MetaData()
tasks = Table(
    "tasks",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("name", String(63), nullable=False),
    Column("next_number", Integer, nullable=False),
    Column("is_pinned", Boolean, nullable=False, server_default=false()),
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
    Column("num_parameters", BigInteger, nullable=False),
    Column("num_items", BigInteger, nullable=False),
    Column("num_matrix_items", BigInteger, nullable=False),
    Column("num_virtual", Integer, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("prompt_format", JSON, nullable=True),
    Column("note", String(1000), nullable=False),
    Column("created", Float, nullable=False),
    Column("proved", String(64), nullable=True),  # what its bytes passed the proof under, a base and a software
    UniqueConstraint("task_id", "number"),
    UniqueConstraint("task_id", "digest"),
)
routes = Table(
    "routes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("task_id", ForeignKey("tasks.id"), nullable=False, index=True),
    Column("weights", JSON, nullable=False),  # {version number as text: weight}
    Column("sticky", String(10), nullable=True),
    Column("created", Float, nullable=False),
)
removed = Table(  # digests of versions that were deleted, so that no start takes them in again
    "removed",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("task_id", ForeignKey("tasks.id"), nullable=False, index=True),
    Column("digest", String(64), nullable=False),
    UniqueConstraint("task_id", "digest"),
)
identity = Table("identity", metadata, Column("id", String(32), primary_key=True))  # one row: which registry this is
usage = Table(
    "usage",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("task", String(63), nullable=False),
    Column("version", Integer, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    UniqueConstraint("tenant", "task", "version"),
)
tenants = Table(
    "tenants",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("limits", JSON, nullable=False),  # {name of a limit: value}, of those that are set
    Column("created", Float, nullable=False),
    Column("deleted", Float, nullable=True),  # the row stays, so that a name is never given twice
)
keys = Table(
    "keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("tenant", ForeignKey("tenants.name"), nullable=False, index=True),
    Column("hash", String(64), nullable=False),  # sha256 of the secret, which is kept nowhere
    Column("scopes", JSON, nullable=False),
    Column("note", String(200), nullable=False),
    Column("created", Float, nullable=False),
)
audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("actor", String(63), nullable=False),
    Column("tenant", String(63), nullable=False, index=True),
    Column("action", String(40), nullable=False),
    Column("what", JSON, nullable=False),
    Column("request_id", String(64), nullable=True),
)


def connect(url: str) -> Engine:
    """An engine for a database URL. Its write transactions begin by taking the one writer's turn.

    Raises `StoreError` for a URL that is none of ours, or whose driver is not installed.
    """
    try:
        parsed = make_url(url.replace("postgres://", "postgresql://", 1))
        if parsed.get_backend_name() not in (SQLITE, POSTGRESQL):
            raise StoreError(f"the registry is kept in SQLite or PostgreSQL, not in {parsed.get_backend_name()}")
        if parsed.drivername == POSTGRESQL:
            parsed = parsed.set(drivername="postgresql+psycopg")
        engine = create_engine(parsed, pool_pre_ping=parsed.get_backend_name() == POSTGRESQL)
    except ArgumentError:
        raise StoreError("the registry's URL is none: sqlite:///FILE or postgresql://USER@HOST/DATABASE") from None
    except ImportError:
        raise StoreError("the driver of PostgreSQL is not installed: pip install 'manyhats[postgres]'") from None
    if engine.dialect.name == SQLITE:
        event.listen(engine, "connect", _tune_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        event.listen(engine, "begin", _begin_postgresql)
    return engine


@contextmanager
def transaction(engine: Engine, is_write: bool) -> Iterator[Connection]:
    """A transaction: all that is read in it is of one moment, all that is written is durable when the block ends.

    Nobody writes beside a writer. Raises `OSError` where SQLite could not read or write its file, and
    `RegistryDownError` where PostgreSQL does not answer.
    """
    options: dict[str, Any] = {"is_write": is_write}
    if engine.dialect.name == POSTGRESQL:  # a writer reads after its turn has come what others wrote before
        options["isolation_level"] = "READ COMMITTED" if is_write else "REPEATABLE READ"
    try:
        with engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection
    except DBAPIError as error:
        if engine.dialect.name == POSTGRESQL and isinstance(error, OperationalError):
            raise RegistryDownError("the registry's database does not answer; try again in a moment") from error
        fault = DISK_FAULTS.get(getattr(error.orig, "sqlite_errorcode", 0) & 0xFF)
        if fault is None:
            raise
        raise OSError(fault, os.strerror(fault)) from error


def hold(engine: Engine) -> Connection | None:
    """Be the one server of a PostgreSQL database until the connection is closed. Raises `StoreError` where another is.

    None: of SQLite, whose folder the server holds.
    """
    if engine.dialect.name != POSTGRESQL:
        return None
    try:
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    except OperationalError as error:
        raise StoreError(f"the registry's database cannot be reached: {str(error.orig).splitlines()[0]}") from None
    if not connection.execute(select(func.pg_try_advisory_lock(SERVER_LOCK))).scalar():
        connection.close()
        raise StoreError("another server uses the registry's database; give this one its own")
    return connection


def migrate(connection: Connection) -> None:
    """Bring a database to the newest schema (alembic; the scripts are in `migrations/`)."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _tune_sqlite(connection: Any, _record: Any) -> None:
    """Readers beside a writer; a commit is durable; references hold; transactions begin where `_begin_sqlite` says."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes its turn at once: one that began as a reader would fail if another wrote meanwhile."""
    is_write = connection.get_execution_options().get("is_write", False)
    if is_write and not connection.info.get(IS_NAMED):
        _sync_names(connection)
        connection.info[IS_NAMED] = True
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")


def _sync_names(connection: Connection) -> None:
    """Make the names of SQLite's files durable before a connection first writes.

    SQLite syncs their folder at the first write itself, and passes over an error of that: so this is that write.
    """
    version = connection.exec_driver_sql("PRAGMA user_version").scalar()
    connection.exec_driver_sql(f"PRAGMA user_version={version}")
    _number, _name, file = connection.exec_driver_sql("PRAGMA database_list").one()
    if file:
        fsync(Path(file).parent)


def _begin_postgresql(connection: Connection) -> None:
    """A writer waits for its turn before it reads anything; it ends with the transaction."""
    if connection.get_execution_options().get("is_write", False):
        connection.execute(select(func.pg_advisory_xact_lock(WRITER_LOCK)))
