"""The registry: numbers that are never given twice, routes, usage, and what survives."""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy.exc import DBAPIError

from adapters_store.errors import AbsentError
from adapters_store.format.manifest import Around, GenerationDefaults, PromptFormat, TaskForm
from adapters_store.registry import database
from adapters_store.registry.database import connect, metadata, transaction
from adapters_store.registry.registry import Facts, Registry, Usage, Version

D1, D2, D3 = "1" * 64, "2" * 64, "3" * 64


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'registry.db'}"


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    registry = Registry(url).open()
    yield registry
    registry.close()


def add(registry: Registry, digest: str, task: str = "t", tenant: str = "default", **more: Any) -> tuple[Version, bool]:
    """Add a version of made-up size."""
    values = {
        "method": "lora",
        "num_parameters": 7,
        "num_items": 9,
        "num_matrix_items": 8,
        "num_virtual": 0,
        "num_bytes": 99,
        **more,
    }
    how = {name: values.pop(name) for name in ("note", "activate") if name in values}
    return registry.add_version(tenant, task, Facts(digest=digest, **values), **how)


def test_versions_are_numbered_and_routed_to(registry: Registry) -> None:
    """Each upload is the task's next version and the one that it serves."""
    first, is_new = add(registry, D1, note="first")
    assert (first.number, first.digest, first.note, is_new) == (1, D1, "first", True)
    assert add(registry, D2)[0].number == 2
    assert registry.resolve("default", "t").digest == D2
    assert registry.resolve("default", "t", 1) == first
    task = registry.task("default", "t")
    assert [version.number for version in task.versions] == [1, 2]
    assert task.route.weights == {2: 100}


def test_the_same_bytes_again_are_the_same_version(registry: Registry) -> None:
    """The same digest in the same task makes no version, and serves it again, as an upload asks."""
    first, _ = add(registry, D1)
    add(registry, D2)
    assert add(registry, D1, activate=False) == (first, False)
    assert registry.resolve("default", "t").digest == D2
    assert add(registry, D1) == (first, False)
    assert registry.resolve("default", "t").digest == D1
    assert len(registry.task("default", "t").versions) == 2


def test_two_tasks_share_a_digest(registry: Registry) -> None:
    """A blob may go only when the last version that refers to it is gone."""
    add(registry, D1, "a")
    add(registry, D1, "b")
    assert registry.delete_task("default", "a") == [D1]
    assert registry.digests() == {D1}
    assert registry.delete_version("default", "b", 1) == D1
    assert registry.digests() == set()


def test_without_activate_the_route_stays(registry: Registry) -> None:
    """A version that is only stored is reached by its number alone."""
    add(registry, D1)
    add(registry, D2, activate=False)
    assert registry.resolve("default", "t").number == 1
    assert registry.resolve("default", "t", 2).digest == D2


def test_a_task_whose_versions_are_only_stored_serves_none(registry: Registry) -> None:
    """A task that nothing was routed to serves no version: none is guessed."""
    add(registry, D1, activate=False)
    with pytest.raises(AbsentError, match="no version in its route"):
        registry.resolve("default", "t")


@pytest.mark.parametrize("whole_task", [False, True])
def test_a_number_is_never_given_twice(registry: Registry, whole_task: bool) -> None:
    """After a delete, also of the whole task, the same bytes become a new number."""
    add(registry, D1)
    add(registry, D2)
    if whole_task:
        registry.delete_task("default", "t")
    else:
        registry.delete_version("default", "t", 2)
    version, is_new = add(registry, D2)
    assert (version.number, is_new) == (3, True)


def test_deleting_the_routed_version_routes_to_none(registry: Registry) -> None:
    """The task never falls to another version by itself."""
    add(registry, D1)
    add(registry, D2)
    registry.delete_version("default", "t", 2)
    assert registry.task("default", "t").route.weights == {}
    with pytest.raises(AbsentError, match="no version in its route"):
        registry.resolve("default", "t")
    assert registry.resolve("default", "t", 1).digest == D1


def test_deleting_another_version_leaves_the_route(registry: Registry) -> None:
    """A version that is not routed to can be deleted without a change of the route."""
    add(registry, D1)
    add(registry, D2)
    registry.delete_version("default", "t", 1)
    assert registry.task("default", "t").route.weights == {2: 100}


def test_a_task_without_versions_is_absent(registry: Registry) -> None:
    """After its last version a task is as if it had never been."""
    add(registry, D1)
    registry.delete_version("default", "t", 1)
    assert registry.tasks("default") == []
    for call in (registry.task, registry.resolve, registry.delete_task):
        with pytest.raises(AbsentError, match="there is no task t"):
            call("default", "t")


@pytest.mark.parametrize("number", [0, -1, 2, 2**63, 10**30])
def test_an_absent_version_is_absent(registry: Registry, number: int) -> None:
    """Numbers that no version has, also those that SQL cannot hold."""
    add(registry, D1)
    with pytest.raises(AbsentError, match="task t has no version"):
        registry.resolve("default", "t", number)
    with pytest.raises(AbsentError, match="task t has no version"):
        registry.delete_version("default", "t", number)


def test_what_is_foreign_is_absent(registry: Registry) -> None:
    """Another tenant's task answers word for word as one that does not exist; equal names are two tasks."""
    add(registry, D1, tenant="theirs")
    with pytest.raises(AbsentError) as foreign:
        registry.resolve("ours", "t", 1)
    assert str(foreign.value) == "there is no task t"
    assert registry.tasks("ours") == []
    add(registry, D2, tenant="ours")
    assert registry.resolve("theirs", "t").digest == D1
    registry.delete_task("ours", "t")
    assert registry.resolve("theirs", "t").digest == D1


def test_tasks_are_listed_by_name(registry: Registry) -> None:
    """A tenant sees its own tasks, in order."""
    for name in ("b", "a", "c"):
        add(registry, D1, name)
    assert [task.name for task in registry.tasks("default")] == ["a", "b", "c"]


def test_everything_survives_a_restart(registry: Registry, url: str) -> None:
    """A new process finds versions, prompt format, ends, route and usage as they were."""
    prompt_format = PromptFormat(begin="<s>", user=Around("U:", "\n"), generation="A: 🎩")
    generation = GenerationDefaults(temperature=0.5)
    form = TaskForm(schema={"type": "object"})
    version, _ = add(registry, D1, prompt_format=prompt_format, ends=(2, 7), generation=generation, form=form)
    registry.add_usages({("default", "t", 1): (1, 5, 6)})
    again = Registry(url).open()
    assert again.resolve("default", "t") == version
    assert again.resolve("default", "t").prompt_format == prompt_format
    assert again.resolve("default", "t").ends == (2, 7)
    assert again.resolve("default", "t").generation == generation
    assert again.resolve("default", "t").form == form
    assert again.usage("default") == registry.usage("default")
    again.close()


def test_usage_adds_up(registry: Registry) -> None:
    """Counts grow by task and version, the base's as version 0, each tenant's apart."""
    for version, times in ((1, 3), (0, 1)):
        for _ in range(times):
            registry.add_usages({("default", "t", version): (1, 10, 20)})
    registry.add_usages({("other", "t", 1): (1, 1, 1)})
    assert registry.usage("default") == [Usage("t", 0, 1, 10, 20), Usage("t", 1, 3, 30, 60)]


def test_uploads_at_once_get_numbers_of_their_own(registry: Registry, url: str) -> None:
    """16 threads over two connections each get another number, and the same bytes at once are one version."""
    other = Registry(url).open()
    numbers: list[int] = []

    def upload(place: int) -> None:
        which = (registry, other)[place % 2]
        numbers.append(add(which, f"{place % 8:064d}")[0].number)

    threads = [threading.Thread(target=upload, args=(place,)) for place in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert sorted(numbers) == sorted([*range(1, 9)] * 2)


def test_a_failed_upload_leaves_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Task, version and route come together or not at all."""

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adapters_store.registry.registry.set_route", fail)
    with pytest.raises(OSError, match="No space"):
        add(registry, D1)
    monkeypatch.undo()
    assert registry.tasks("default") == []
    assert add(registry, D1)[0].number == 1


def test_a_full_disk_is_the_disks_error(registry: Registry) -> None:
    """Where SQLite cannot write its file, an `OSError` says so, nothing of the upload is kept, and reading goes on."""
    add(registry, D1)
    with registry._read() as connection:
        num_pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={num_pages}")
    with pytest.raises(OSError, match="No space left") as caught:
        for number in range(1000):
            add(registry, f"{number + 10:064d}", f"t{number}", note="x" * 1000)
    assert caught.value.errno == errno.ENOSPC
    assert registry.resolve("default", "t").digest == D1


def test_a_disk_that_is_read_only_is_the_disks_error(registry: Registry) -> None:
    """Any error of the file is an `OSError`; any other error of the database stays what it is."""
    with registry._read() as connection:
        connection.exec_driver_sql("PRAGMA query_only=ON")
    with pytest.raises(OSError, match="Read-only") as caught:
        add(registry, D1)
    assert caught.value.errno == errno.EROFS
    with pytest.raises(DBAPIError, match="no such table"), registry._read() as connection:
        connection.exec_driver_sql("SELECT 1 FROM absent")


def test_commits_are_durable_and_references_hold(registry: Registry, url: str) -> None:
    """SQLite runs with a write-ahead log, a sync at every commit, and foreign keys."""
    with connect(url).connect() as connection:
        found = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert found == ["wal", 2, 1]


def test_a_reader_does_not_wait_for_a_writer(registry: Registry) -> None:
    """Requests resolve what is committed while an upload's transaction is open."""
    add(registry, D1)
    with registry._write():
        assert registry.resolve("default", "t").digest == D1


def test_migrations_make_the_tables_that_the_code_uses(registry: Registry, url: str) -> None:
    """The scripts and the tables in the code are the same schema; opening again changes nothing."""
    Registry(url).open().close()
    with connect(url).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_registry_must_be_opened(url: str) -> None:
    """Using it before is a clear error."""
    with pytest.raises(RuntimeError, match="not open"):
        Registry(url).tasks("default")


def test_a_file_that_is_no_database_is_not_overwritten(tmp_path: Path, url: str) -> None:
    """A file in the registry's place that is no database is left unchanged."""
    (tmp_path / "registry.db").write_bytes(b"precious" * 1000)
    with pytest.raises(OSError, match="not a database"):
        Registry(url).open()
    assert (tmp_path / "registry.db").read_bytes() == b"precious" * 1000


def test_a_database_of_the_first_schema_is_migrated(url: str) -> None:
    """What was registered before sizes were kept is LoRA: it takes what was trained, and has no virtual tokens."""
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    with transaction(connect(url), is_write=True) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.exec_driver_sql("INSERT INTO tasks (tenant, name, next_number) VALUES ('default', 't', 2)")
        connection.exec_driver_sql(
            "INSERT INTO versions (task_id, number, digest, method, num_parameters, num_bytes, note, created) "
            "VALUES (1, 1, ?, 'lora', 7, 99, 'old', 1.5)",
            (D1,),
        )
        connection.exec_driver_sql("INSERT INTO routes (task_id, weights, created) VALUES (1, '{\"1\": 100}', 1.5)")
    registry = Registry(url).open()
    old = registry.resolve("default", "t")
    assert (old.digest, old.num_parameters, old.num_virtual, old.note) == (D1, 7, 0, "old")
    assert (old.num_items, old.num_matrix_items) == (7, 7)
    new, _ = add(registry, D2, num_parameters=6, num_items=12, num_matrix_items=10, num_virtual=3)
    assert (new.number, new.num_items, new.num_matrix_items, new.num_virtual) == (2, 12, 10, 3) and registry.resolve(
        "default", "t"
    ) == new
    registry.close()


def test_sqlite_itself_agrees(registry: Registry, tmp_path: Path) -> None:
    """A backup tool sees a sound file."""
    add(registry, D3)
    connection = sqlite3.connect(tmp_path / "registry.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
