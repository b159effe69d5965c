"""The registry in PostgreSQL: what holds for SQLite holds there, and what only a server of its own can do."""

from __future__ import annotations

import builtins
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import func, select

from adapters_store.errors import RegistryDownError, RegistryHeldError, StoreError
from adapters_store.registry.database import connect, metadata, transaction, versions
from adapters_store.registry.registry import Registry
from adapters_store.registry.routes import Route
from adapters_store.registry.tenants import TenantLimits, Tenants
from tests.adapters_store.registry.test_registry import (  # noqa: F401 - the same tests, over this file's registry
    D1,
    D2,
    add,
    test_a_failed_upload_leaves_nothing,
    test_a_number_is_never_given_twice,
    test_a_task_without_versions_is_absent,
    test_an_absent_version_is_absent,
    test_deleting_the_routed_version_routes_to_none,
    test_tasks_are_listed_by_name,
    test_the_same_bytes_again_are_the_same_version,
    test_two_tasks_share_a_digest,
    test_usage_adds_up,
    test_versions_are_numbered_and_routed_to,
    test_what_is_foreign_is_absent,
)
from tests.kit.services import postgresql


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a real server's database."""
    with postgresql() as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    """The URL of the same database, emptied."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return server


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    registry = Registry(url).open()
    yield registry
    registry.close()


def test_migrations_make_the_tables_that_the_code_uses(registry: Registry, url: str) -> None:
    """The migrated schema is the code's."""
    registry.close()
    Registry(url).open().close()
    engine = connect(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_uploads_at_once_get_numbers_of_their_own(registry: Registry) -> None:
    """Writers take turns: of uploads at once each gets a number, and the last one is the route."""
    digests = [f"{number:064d}" for number in range(12)]
    threads = [threading.Thread(target=add, args=(registry, digest)) for digest in digests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    task = registry.task("default", "t")
    assert [version.number for version in task.versions] == list(range(1, 13))
    assert {version.digest for version in task.versions} == set(digests)


def test_a_reader_sees_one_moment(registry: Registry) -> None:
    """A transaction's reads do not change under it, and do not wait for a writer."""
    add(registry, D1)
    count = select(func.count()).select_from(versions)
    with transaction(registry.engine, is_write=False) as reader:
        assert reader.execute(count).scalar() == 1
        add(registry, D2)
        assert reader.execute(count).scalar() == 1
    with transaction(registry.engine, is_write=False) as reader:
        assert reader.execute(count).scalar() == 2


def test_large_sizes(registry: Registry) -> None:
    """Numbers over 32 bits are kept."""
    version, _ = add(registry, D1, num_bytes=2**40, num_parameters=2**33)
    assert (version.num_bytes, version.num_parameters) == (2**40, 2**33)


def test_one_server_a_database(registry: Registry, url: str) -> None:
    """A second server is refused while the first one is there."""
    with pytest.raises(StoreError, match="another server"):
        Registry(url).open()
    registry.close()
    Registry(url.replace("postgresql://", "postgres://")).open().close()


def test_connections_that_were_cut(registry: Registry, server: str) -> None:
    """After a restart of the database the next call works; while it is away the error says so."""
    add(registry, D1)
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    assert registry.resolve("default", "t").digest == D1
    away = connect("postgresql://manyhats@127.0.0.1:1/postgres")
    with pytest.raises(RegistryDownError, match="does not answer"), transaction(away, is_write=False):
        pass
    with pytest.raises(StoreError, match="cannot be reached"):
        Registry("postgresql://manyhats@127.0.0.1:1/postgres").open()


def cut(server: str) -> None:
    """Cut every connection, as a restart of the database does."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")


def test_a_database_is_held_again_after_a_cut(registry: Registry, server: str, url: str) -> None:
    """A server whose connections were cut takes the lock again at its next check, and writes as before."""
    cut(server)
    registry.check()
    with pytest.raises(StoreError, match="another server"):
        Registry(url).open()
    add(registry, D1)
    registry.check()


WRITES: dict[str, Callable[[Registry], object]] = {
    "add_version": lambda registry: add(registry, D2),
    "set_route": lambda registry: registry.set_route("default", "t", Route({1: 1})),
    "roll_back": lambda registry: registry.roll_back("default", "t"),
    "set_pinned": lambda registry: registry.set_pinned("default", "t", True),
    "delete_task": lambda registry: registry.delete_task("default", "t"),
    "delete_version": lambda registry: registry.delete_version("default", "t", 1),
    "set_validated": lambda registry: registry.set_validated(D1, "f"),
    "add_usages": lambda registry: registry.add_usages({("default", "t", 1): (1, 1, 1)}),
    "forget_usage": lambda registry: registry.forget_usage(0.0),
    "digests": lambda registry: registry.digests(),  # by which artifacts are deleted
    "add": lambda registry: Tenants(registry.engine).add("t"),
    "delete": lambda registry: Tenants(registry.engine).delete("t"),
    "set_limits": lambda registry: Tenants(registry.engine).set_limits("default", TenantLimits()),
    "add_key": lambda registry: Tenants(registry.engine).add_key("default", ["admin"]),
    "rotate_key": lambda registry: Tenants(registry.engine).rotate_key("default", "mh_x"),
    "revoke_key": lambda registry: Tenants(registry.engine).revoke_key("default", "mh_x"),
    "forget_changes": lambda registry: Tenants(registry.engine).forget_changes(0.0),
}


def test_a_server_whose_database_was_taken_over_writes_nothing(registry: Registry, server: str, url: str) -> None:
    """After a cut and another server's start no call writes, also once that one is gone; reads go on."""
    add(registry, D1)
    cut(server)
    other = Registry(url).open()
    assert other.digests() == {D1}
    for is_there in (True, False):
        with pytest.raises(RegistryHeldError, match="another server"):
            registry.check()
        for name, write in WRITES.items():
            with pytest.raises(RegistryHeldError, match="another server"):
                write(registry)
                pytest.fail(name)
        assert registry.resolve("default", "t").digest == D1
        if is_there:
            assert other.usage("default") == []
            other.close()


def test_all_writes_are_here() -> None:
    """`WRITES` has every method of the registry and of the tenants that opens a transaction to write."""
    found = set()
    for kind in (Registry, Tenants):
        for name, method in inspect.getmembers(kind, inspect.isfunction):
            if "self._write()" in inspect.getsource(method) and name not in ("open", "_write"):
                found.add(name)
    assert found == set(WRITES)


def test_a_driver_that_is_missing_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing psycopg is refused with what to install, and a bad URL with the forms that are accepted."""
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "psycopg":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for wrong, said in (("nonsense", "URL is none"), ("mysql://x/y", "not in mysql")):
        with pytest.raises(StoreError, match=said):
            connect(wrong)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(StoreError, match=r"pip install 'manyhats\[postgres\]'"):
        connect("postgresql://x/y")
