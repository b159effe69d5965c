"""A disk that is full, a database that another program has locked: a sentence and a code on every route, few lines."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import event

from adapters_store.errors import StoreError
from adapters_store.registry import database
from server.logs import OncePerMinute
from tests.server.api.test_hang import ADMIN, NEEDS_NO_REGISTRY, READY, ask_all, city
from tests.server.api.test_tenants import Clock
from tests.server.world import error_of, open_site

pytestmark = pytest.mark.anyio
READS = {
    *NEEDS_NO_REGISTRY,
    *READY,
    ("get", "/v1/models"),
    ("get", "/tasks"),
    ("get", "/tasks/{task}"),
    ("get", "/tasks/{task}/versions/{number}/artifact"),
    ("get", "/tenants"),
    ("get", "/tenants/{tenant}/keys"),
    ("get", "/usage"),
    ("get", "/audit"),
}

LOOKS_FIRST = {  # there is no such key, no such folder, no such task: 404
    ("post", "/tenants/{tenant}/keys/{key_id}/rotate"),
    ("post", "/v1/load_lora_adapter"),
    ("post", "/v1/unload_lora_adapter"),
}


async def test_a_registry_that_another_program_has_locked(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every route that only reads is answered; every other one is 503 with a sentence until the lock is gone."""
    monkeypatch.setattr(database, "LOCKED_WITHIN_S", 0.05)
    async with city(tiny_base, tmp_path, zips) as site:
        other = sqlite3.connect(tmp_path / "registry.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        answers = await ask_all(site, zips)
        other.execute("ROLLBACK")
        other.close()
        assert {route for route, answer in answers.items() if answer.status_code == 200} == READS
        for route in answers.keys() - READS - LOOKS_FIRST:
            error = error_of(answers[route])
            assert (answers[route].status_code, error["code"]) == (503, "registry_unavailable"), route
            assert "locked" in error["message"] and "retry-after" in answers[route].headers
        headers = {**ADMIN, "Content-Type": "application/zip"}
        assert (await site.http.post("/adapters?task=a", content=zips[1], headers=headers)).status_code == 201


async def test_a_full_disk_writes_few_lines(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """Every route on a full disk, three times: no 500, no traceback, and of each message one line in that minute."""

    def full(_connection: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with city(tiny_base, tmp_path, zips) as site:
        engine = site.state.stores.registry.engine
        event.listen(engine, "begin", full)
        caplog.clear()
        caplog.handler.addFilter(bound := OncePerMinute())
        statuses = [answer.status_code for _ in range(3) for answer in (await ask_all(site, zips)).values()]
        caplog.handler.removeFilter(bound)
        event.remove(engine, "begin", full)
        assert statuses.count(507) > 30 and 500 not in statuses
        faults = [record for record in caplog.records if record.levelno > logging.INFO]
        assert 0 < len(faults) == len({record.message for record in faults})
        assert not any(record.exc_info for record in faults)


async def test_a_damaged_registry_is_the_disks_error(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]
) -> None:
    """Whatever of its file SQLite cannot read, no route answers 500, the sentence says why, and so does `ready`."""
    async with city(tiny_base, tmp_path, zips) as site:
        registry, file = site.state.stores.registry, tmp_path / "registry.db"
        registry.engine.dispose()
        pages = file.read_bytes()
        file.write_bytes(pages[:4096] + bytes(range(1, 251)) * 200)
        answers = await ask_all(site, zips)
        failed = {route for route, answer in answers.items() if answer.status_code == 507}
        assert len(failed) > 15 and not any(answer.status_code == 500 for answer in answers.values())
        assert all("malformed" in error_of(answers[route])["message"] for route in failed)
        with pytest.raises(OSError, match="malformed"):
            registry.check()


def test_a_line_says_how_many_were_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """A minute after the first line the next one passes, with the number of those that did not; others pass always."""
    clock = Clock()
    caplog.set_level(logging.INFO)
    caplog.handler.addFilter(bound := OncePerMinute(clock))
    log = logging.getLogger("test")
    for _ in range(125):
        log.warning("full", extra={"cause": "disk"})
        log.warning("other", extra={"cause": "disk"})
        log.info("none")
        clock.now += 0.5
    caplog.handler.removeFilter(bound)
    assert [vars(record)["left_out"] for record in caplog.records if record.message == "full"] == [0, 119]
    assert [record.message for record in caplog.records].count("none") == 125


@pytest.mark.parametrize("link", [False, True])
async def test_one_server_a_file(anyio_backend: str, tiny_base: Path, tmp_path: Path, link: bool) -> None:
    """A second server on the same SQLite file is refused, though its data folder is another one, and so by a link."""
    registry = other = f"sqlite:///{tmp_path / 'registry.db'}"
    if link:
        (tmp_path / "link.db").symlink_to("registry.db")
        other = f"sqlite:///{tmp_path / 'link.db'}"
    async with open_site(tiny_base, tmp_path / "one", registry=registry):
        with pytest.raises(BlockingIOError, match=r"another server uses the registry .*registry\.db"):
            async with open_site(tiny_base, tmp_path / "two", registry=other):
                pass
    async with open_site(tiny_base, tmp_path / "two", registry=other):
        await asyncio.sleep(0)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:registry.db?uri=true"])
async def test_a_registry_is_in_a_file(anyio_backend: str, tiny_base: Path, tmp_path: Path, url: str) -> None:
    """A registry that ends with the process, or whose file no lock finds, is refused by a sentence."""
    with pytest.raises(StoreError, match="sqlite:///FILE"):
        async with open_site(tiny_base, tmp_path, registry=url):
            pass
