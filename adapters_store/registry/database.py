"""Define the registry's tables, and connect to them: migrated to the newest schema, durable, one writer at a time.

The database is SQLite by default, or PostgreSQL by its URL.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
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
    insert,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from adapters_store.durable import fsync
from adapters_store.errors import RegistryDownError, RegistryHeldError, StoreError

SQLITE, POSTGRESQL = "sqlite", "postgresql"
NUM_CONNECTIONS = 8
LOCKED_WITHIN_S = 5  # that SQLite waits for another program's lock
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
WRITER_LOCK, SERVER_LOCK = 0x6D616E79, 0x68617473  # advisory locks, one of each per database
DISK_FAULTS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_CANTOPEN: errno.EIO,
    sqlite3.SQLITE_CORRUPT: errno.EIO,
    sqlite3.SQLITE_NOTADB: errno.EIO,
}
NO_FILES = (":memory:", "file:")  # what an SQLite URL may have instead of a path
IS_NAMED = "manyhats_is_named"  # set on a connection that has written

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
    Column("ends", JSON, nullable=False, server_default="[]"),  # token ids
    Column("generation", JSON, nullable=True),
    Column("form", JSON, nullable=True),
    Column("tools", JSON, nullable=True),
    Column("reasoning", JSON, nullable=True),
    Column("note", String(1000), nullable=False),
    Column("created", Float, nullable=False),
    Column("proved", String(64), nullable=True),  # fingerprint of the base and software of the last validation
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
removed = Table(  # digests of deleted versions, which no start imports again
    "removed",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("task_id", ForeignKey("tasks.id"), nullable=False, index=True),
    Column("digest", String(64), nullable=False),
    UniqueConstraint("task_id", "digest"),
)
identity = Table(  # one row
    "identity",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("server", String(32), nullable=True),  # the one that opened the database last: no other may write
)
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
    Column("last", Float, nullable=False, server_default="0"),  # used, in Unix seconds
    UniqueConstraint("tenant", "task", "version"),
)
tenants = Table(
    "tenants",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("limits", JSON, nullable=False),  # {limit: value}, those that are set
    Column("created", Float, nullable=False),
    Column("deleted", Float, nullable=True),  # the row stays: names are never reused
)
keys = Table(
    "keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("tenant", ForeignKey("tenants.name"), nullable=False, index=True),
    Column("hash", String(64), nullable=False),  # sha256 of the secret, which is not stored
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


def sqlite_file(url: str) -> Path | None:
    """Return the file of an SQLite URL, whatever links lead to it; None for any other URL."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return None
    if parsed.get_backend_name() != SQLITE or not parsed.database or parsed.database.startswith(NO_FILES):
        return None
    return Path(parsed.database).resolve()


def connect(url: str) -> Engine:
    """Create an engine for a database URL, whose write transactions start by waiting for their turn as the only writer.

    Raises `StoreError` for a URL that is not served, or whose driver is not installed.
    """
    try:
        parsed = make_url(url.replace("postgres://", "postgresql://", 1))
        if parsed.get_backend_name() not in (SQLITE, POSTGRESQL):
            raise StoreError(f"the registry is kept in SQLite or PostgreSQL, not in {parsed.get_backend_name()}")
        if parsed.drivername == POSTGRESQL:
            parsed = parsed.set(drivername="postgresql+psycopg")
        is_postgresql = parsed.get_backend_name() == POSTGRESQL
        if not parsed.database or (not is_postgresql and parsed.database.startswith(NO_FILES)):
            raise ArgumentError
        if is_postgresql:
            from adapters_store.registry import postgresql  # it needs the driver, which is an extra
        waiting = {} if is_postgresql else {"timeout": LOCKED_WITHIN_S}
        engine = create_engine(parsed, pool_size=NUM_CONNECTIONS, pool_pre_ping=is_postgresql, connect_args=waiting)
    except ArgumentError:
        raise StoreError("the registry's URL is none: sqlite:///FILE or postgresql://USER@HOST/DATABASE") from None
    except ImportError:
        raise StoreError("the driver of PostgreSQL is not installed: pip install 'manyhats[postgres]'") from None
    if engine.dialect.name == SQLITE:
        event.listen(engine, "connect", _tune_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        event.listen(engine, "do_connect", postgresql.connect)
        event.listen(engine, "begin", _begin_postgresql)
    return engine


@contextmanager
def transaction(engine: Engine, is_write: bool) -> Iterator[Connection]:
    """Open a transaction: its reads see one moment, its writes are durable when the block ends.

    Only one writer runs at a time. Raises `OSError` if SQLite cannot read or write its file, `RegistryDownError` if
    PostgreSQL does not answer, and `RegistryHeldError` if another program or server keeps this one from writing.
    """
    options: dict[str, Any] = {"is_write": is_write}
    if engine.dialect.name == POSTGRESQL:  # a writer must see what was written before its turn
        options["isolation_level"] = "READ COMMITTED" if is_write else "REPEATABLE READ"
    try:
        with engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection
    except DBAPIError as error:
        if engine.dialect.name == POSTGRESQL and isinstance(error, OperationalError):
            raise RegistryDownError("the registry's database does not answer; try again in a moment") from error
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        if code in BUSY:
            raise RegistryHeldError("another program has locked the registry's file; try again in a moment") from error
        fault = DISK_FAULTS.get(code)
        if fault is None:
            raise
        raise OSError(fault, f"{os.strerror(fault)}: {error.orig}", engine.url.database) from error


def hold(engine: Engine) -> Connection | None:
    """Claim a PostgreSQL database for this server while the returned connection lives.

    Returns None for SQLite, whose file the server locks. Raises `RegistryDownError` if the database does not answer,
    and `RegistryHeldError` if another server has it.
    """
    if engine.dialect.name != POSTGRESQL:
        return None
    try:
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        if connection.execute(select(func.pg_try_advisory_lock(SERVER_LOCK))).scalar():
            return connection
    except OperationalError as error:
        reason = str(error.orig).splitlines()[0]
        raise RegistryDownError(f"the registry's database cannot be reached: {reason}") from None
    connection.close()
    raise RegistryHeldError("another server uses the registry's database; give this one its own")


def is_alive(connection: Connection) -> bool:
    """Tell if a connection still answers."""
    try:
        connection.execute(select(1))
    except DBAPIError:
        return False
    return True


def allow_writes_of(engine: Engine, server: str) -> None:
    """Let a PostgreSQL database be written by this server alone, until another one opens it.

    The claim of `hold` ends with its connection, as when the database is restarted: a server that opened the database
    meanwhile has swept what this one was about to keep. From then on all writes here raise `RegistryHeldError`.
    """
    with transaction(engine, is_write=True) as connection:
        if not connection.execute(update(identity).values(server=server)).rowcount:
            connection.execute(insert(identity).values(id=uuid.uuid4().hex, server=server))
    if engine.dialect.name == POSTGRESQL:
        event.listen(engine, "begin", partial(_refuse_unless_owner, server))


def _refuse_unless_owner(server: str, connection: Connection) -> None:
    """Raise `RegistryHeldError` if a transaction would write, and another server opened the database since."""
    if connection.get_execution_options().get("is_write", False):
        ensure_owner(connection, server)


def ensure_owner(connection: Connection, server: str) -> None:
    """Raise `RegistryHeldError` if another server opened the database since this one did."""
    if connection.execute(select(identity.c.server)).scalar() != server:
        raise RegistryHeldError("another server has taken the registry's database over: this one changes nothing more")


def migrate(connection: Connection) -> None:
    """Upgrade a database to the newest schema (alembic; the scripts are in `migrations/`), however long that takes."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    driver: Any = connection.connection.driver_connection
    if connection.dialect.name == POSTGRESQL:
        driver.limit_s = None
    command.upgrade(config, "head")
    if connection.dialect.name == POSTGRESQL:
        del driver.limit_s


def _tune_sqlite(connection: Any, _record: Any) -> None:
    """Set up a connection: readers run beside a writer, commits are durable, foreign keys hold, no implicit BEGIN."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """Begin a transaction; a writer locks at once: after a read it would fail if another wrote meanwhile."""
    is_write = connection.get_execution_options().get("is_write", False)
    if is_write and not connection.info.get(IS_NAMED):
        _sync_names(connection)
        connection.info[IS_NAMED] = True
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")


def _sync_names(connection: Connection) -> None:
    """Make the directory entries of SQLite's files durable before a connection first writes.

    SQLite syncs their folder itself at the first write, but ignores an error of that: so that write is made here.
    """
    version = connection.exec_driver_sql("PRAGMA user_version").scalar()
    connection.exec_driver_sql(f"PRAGMA user_version={version}")
    _number, _name, file = connection.exec_driver_sql("PRAGMA database_list").one()
    if file:
        fsync(Path(file).parent)


def _begin_postgresql(connection: Connection) -> None:
    """Let a writer wait for its turn before it reads anything; the lock ends with the transaction."""
    if connection.get_execution_options().get("is_write", False):
        connection.execute(select(func.pg_advisory_xact_lock(WRITER_LOCK)))
