"""Imports at start: a slow machine drops no adapter, and what fails for a passing reason is tried again."""

from __future__ import annotations

import asyncio
import errno
import logging
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from adapters_store.format.folder import WEIGHTS, read_folder
from server.core import EngineFailure
from server.engine.fake import FakeEngineClient
from server.engine.messages import Output, Submit
from server.uploads import preload, validation
from server.uploads.validation import ValidatedArtifact
from tests.server.world import Site, open_site, ready_of, until

pytestmark = pytest.mark.anyio
REFUSED, PENDING = "an adapter was not taken in", "an adapter was not taken in yet; it is tried again"


class SlowEngine(FakeEngineClient):
    """A fake engine whose probes take their time."""

    probe_s = 0.3

    async def _probe(self, submit: Submit) -> AsyncIterator[Output]:
        await asyncio.sleep(self.probe_s)
        async for output in super()._probe(submit):
            yield output


@pytest.fixture
def tree(tmp_path: Path, loras: list[Path]) -> Path:
    """A tree of one good folder, `first`."""
    shutil.copytree(loras[0], tmp_path / "tree" / "first")
    return tmp_path / "tree"


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once."""
    monkeypatch.setattr(preload, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(preload, "MAX_WAIT_S", 0.01)


async def tasks_of(site: Site) -> list[str]:
    """The names of the tasks that the server has."""
    return [task["task"] for task in (await site.http.get("/tasks")).json()["tasks"]]


async def pending_of(site: Site) -> int:
    """What /health/ready says of pending imports."""
    found: int = (await site.http.get("/health/ready")).json()["imports_pending"]
    return found


def said(caplog: pytest.LogCaptureFixture, message: str) -> list[Any]:
    """The log records of this message."""
    return [record for record in caplog.records if record.message == message]


async def test_what_is_not_used_is_told(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tokenizer and whatever else lies beside an adapter is named in the log when the adapter is taken in."""
    (tree / "first" / "tokenizer.json").write_text("{}")
    caplog.set_level(logging.INFO)
    async with open_site(tiny_base, tmp_path / "data", import_=tree):
        (record,) = [record for record in caplog.records if record.getMessage() == "an adapter was taken in"]
    assert "not tokenizer.json" in record.__dict__["ignored"]


async def test_a_slow_engine_drops_no_adapter(
    tiny_base: Path, tmp_path: Path, tree: Path, zips: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import has the time that it needs, where an upload of the same bytes would be too late."""
    monkeypatch.setattr(validation, "PROBE_WITHIN_S", 0.05)
    async with open_site(tiny_base, tmp_path / "data", SlowEngine(ready_of(tiny_base)), import_=tree) as site:
        assert await tasks_of(site) == ["base", "first"] and await pending_of(site) == 0
        assert (await site.upload("other", zips[0])).status_code == 503


@pytest.mark.parametrize("code", ["engine_restarting", "overloaded", "deadline_exceeded", "adapter_failed"])
async def test_what_passes_is_tried_again(
    tiny_base: Path, tmp_path: Path, tree: Path, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    """A failure of the engine that passes leaves the import pending, and it comes in when the engine is well again."""
    engine = FakeEngineClient(ready_of(tiny_base))
    engine.probe_failure = EngineFailure(code, "for now")
    async with open_site(tiny_base, tmp_path / "data", engine, import_=tree) as site:
        assert await tasks_of(site) == ["base"] and await pending_of(site) == 1
        engine.probe_failure = None
        await until(lambda: site.state.imports.num_pending == 0)
        assert await tasks_of(site) == ["base", "first"] and await pending_of(site) == 0
    assert said(caplog, PENDING)[0].reason and not said(caplog, REFUSED)


async def test_a_store_that_is_away(
    tiny_base: Path, tmp_path: Path, tree: Path, loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that does not answer leaves the import pending, too."""
    from adapters_store.storage.directory import Blobs

    put, failures = Blobs.put, [OSError(errno.EIO, "the store does not answer")]

    def flaky(self: Blobs, folder: Path, digest: str) -> None:
        if failures:
            raise failures.pop()
        put(self, folder, digest)

    monkeypatch.setattr(Blobs, "put", flaky)
    async with open_site(tiny_base, tmp_path / "data", import_=tree) as site:
        await until(lambda: site.state.imports.num_pending == 0)
        assert await tasks_of(site) == ["base", "first"] and not failures


async def test_what_is_refused_is_said_once(
    tiny_base: Path, tmp_path: Path, tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A broken folder is not tried again: one line says why."""
    (tree / "first" / WEIGHTS).write_bytes(b"x")
    async with open_site(tiny_base, tmp_path / "data", import_=tree) as site:
        await asyncio.sleep(0.1)
        assert await pending_of(site) == 0
    assert len(said(caplog, REFUSED)) == 1 and not said(caplog, PENDING)


async def test_the_tries_are_bounded(
    tiny_base: Path, tmp_path: Path, tree: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What never passes is given up after so many tries, with one line that says why."""
    monkeypatch.setattr(preload, "MAX_TRIES", 3)
    caplog.set_level(logging.WARNING)
    engine = FakeEngineClient(ready_of(tiny_base))
    engine.probe_failure = EngineFailure("overloaded", "for ever")
    async with open_site(tiny_base, tmp_path / "data", engine, import_=tree) as site:
        await until(lambda: site.state.imports.num_pending == 0)
    assert [record.reason for record in said(caplog, REFUSED)] == ["for ever"]
    assert len(said(caplog, PENDING)) == 2 and len(engine.probed) == 3 * validation.NUM_PROBES


async def test_an_upload_wins(
    tiny_base: Path, tmp_path: Path, tree: Path, zips: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that somebody uploads while its import is validated keeps what was uploaded."""
    engine = FakeEngineClient(ready_of(tiny_base))
    engine.probe_failure = EngineFailure("overloaded", "for now")
    validate, uploads = validation.Validator.validate, [zips[1]]

    async def overtaken(*arguments: Any) -> ValidatedArtifact:
        validated = await validate(*arguments)
        if uploads:  # the import's call: the upload makes one of its own
            assert (await site.upload("first", uploads.pop())).status_code == 201
        return validated

    monkeypatch.setattr(validation.Validator, "validate", overtaken)
    async with open_site(tiny_base, tmp_path / "data", engine, import_=tree) as site:
        engine.probe_failure = None
        await until(lambda: site.state.imports.num_pending == 0)
        assert [version["note"] for version in (await site.http.get("/tasks/first")).json()["versions"]] == [""]


async def test_an_adapter_is_found_at_any_depth(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, loras: list[Path]
) -> None:
    """A folder is the task of the adapter in it, however deep that is; of checkpoints beside it none is taken.

    A folder without an adapter is none.
    """
    tree = tmp_path / "tree"
    shutil.copytree(loras[0], tree / "deep" / "a" / "b")
    shutil.copytree(loras[1], tree / "trained")
    shutil.copytree(loras[2], tree / "trained" / "checkpoint-9")
    (tree / "data").mkdir()
    (tree / "data" / "rows.csv").write_text("x")
    async with open_site(tiny_base, tmp_path / "data", import_=tree) as site:
        assert await tasks_of(site) == ["base", "deep", "trained"]
        versions = {task: site.state.stores.registry.resolve("default", task).digest for task in ("deep", "trained")}
    assert versions == {"deep": read_folder(loras[0]).digest, "trained": read_folder(loras[1]).digest}


async def test_what_cannot_be_told_apart_is_refused_aloud(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, loras: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Two adapters equally deep in one folder are an error in the log that names both; the others are taken in."""
    tree = tmp_path / "tree"
    for name in ("both/one", "both/two", "good"):
        shutil.copytree(loras[0], tree / name)
    async with open_site(tiny_base, tmp_path / "data", import_=tree) as site:
        assert await tasks_of(site) == ["base", "good"]
    (record,) = said(caplog, REFUSED)
    assert record.reason == "parts of an adapter are in one and two: send one of these folders alone"


async def test_a_tree_that_is_an_adapter_itself_is_refused(tiny_base: Path, tmp_path: Path, loras: list[Path]) -> None:
    """A server told to import an adapter's own folder does not start without it in silence: it says what to give."""
    with pytest.raises(NotADirectoryError, match="is an adapter: --import takes the folder around it"):
        async with open_site(tiny_base, tmp_path / "data", import_=loras[0]):
            pass
