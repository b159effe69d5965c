"""The composition root: what starts is ended, what cannot start says why, and a folder of adapters is taken in."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import asdict

from adapters_store.format.folder import CONFIG, WEIGHTS
from server.app import create_app
from server.engine.client import EngineStartError
from server.engine.fake import FakeEngineClient
from server.engine.messages import Ready
from server.engine.process_client import ProcessEngineClient
from server.uploads import preload
from tests.golden.make_adapterhub import HERE
from tests.server.world import open_site, ready_of, settings_of, until

pytestmark = pytest.mark.anyio


class Watched(FakeEngineClient):
    """Counts its starts and ends; `refuses` is why it does not start."""

    def __init__(self, base: Path, refuses: str = "") -> None:
        super().__init__(ready_of(base))
        self.refuses, self.calls = refuses, list[str]()

    async def start(self) -> Ready:
        self.calls.append("start")
        if self.refuses:
            raise EngineStartError(self.refuses)
        return await super().start()

    async def close(self) -> None:
        self.calls.append("close")
        await super().close()


async def failure_of(base: Path, data: Path, engine: FakeEngineClient, **settings: Any) -> str:
    """The reason why an application cannot start."""
    app = create_app(settings_of(base, data, **settings), base, engine)
    with pytest.raises(Exception) as error:
        async with app.router.lifespan_context(app):
            pass
    assert str(error.value) == app.state.start_failure
    return str(app.state.start_failure)


async def test_all_is_ended(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """Closing the application closes the engine, writes usage, and leaves no task of ours."""
    engine = Watched(tiny_base)
    async with open_site(tiny_base, tmp_path, engine) as site:
        await site.ask(prompt="ab")
    assert engine.calls == ["start", "close"]
    assert len(asyncio.all_tasks()) <= 2  # this test and its runner


async def test_an_engine_that_cannot_start(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """An engine that cannot start gives the operator its sentence, and everything that was opened is closed."""
    engine = Watched(tiny_base, "this base cannot be served: no attention interface")
    assert "no attention interface" in await failure_of(tiny_base, tmp_path, engine)
    assert engine.calls == ["start", "close"]
    async with open_site(tiny_base, tmp_path):  # the data folder is free again
        pass


async def test_a_tokenizer_that_cannot_be_read(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """The engine that was starting is ended if a later room fails."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "tokenizer.json").write_text("{")
    engine = Watched(tiny_base)
    assert await failure_of(base, tmp_path / "data", engine)
    assert engine.calls[-1] == "close"


async def test_one_server_a_folder(anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]) -> None:
    """A second server on the same data folder does not start, says why, and disturbs nothing of the first."""
    async with open_site(tiny_base, tmp_path) as site:
        digest = (await site.upload("a", zips[0])).json()["digest"]
        (tmp_path / "artifacts" / "staging" / "an upload in flight").mkdir()
        assert "another server uses" in await failure_of(tiny_base, tmp_path, Watched(tiny_base))
        assert (tmp_path / "artifacts" / "staging" / "an upload in flight").is_dir()
        assert site.state.stores.blobs.digests() == {digest}
        assert (await site.ask("a", prompt="x"))["adapter"]["digest"] == digest


async def test_a_data_folder_that_cannot_be(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A data folder that is a file is refused with its name."""
    (tmp_path / "file").write_text("")
    assert "file" in await failure_of(tiny_base, tmp_path / "file", Watched(tiny_base))


async def test_the_engine_is_told_the_settings(tiny_base: Path, tmp_path: Path) -> None:
    """Every setting that the engine shares by name is given to it, and so are the base and the artifacts' folder."""
    values = {"precision": "bf16", "device": "cuda", "num_threads": 3, "kv_cache_bytes": 2**20, "block_size": 16}
    values |= {"max_sequence_tokens": 9, "max_batch_tokens": 16, "max_running": 5, "max_waiting": 6}
    values |= {"slot_bytes": 7, "host_bytes": 8, "cuda_graphs": True, "log_level": "debug", "log_format": "json"}
    config = settings_of(tiny_base, tmp_path, prefix_cache=False, **values).engine_config(tiny_base)
    told = {**asdict(config), **asdict(config.runner)}
    assert {name: told[name] for name in values} == values
    assert (told["folder"], told["name"], config.is_prefix_cached) == (str(tiny_base), str(tiny_base), False)
    of_no_setting = told.keys() - values.keys() - {"runner", "folder", "name", "blobs", "store", "is_prefix_cached"}
    assert of_no_setting == {"copy_bytes_per_step", "num_loaders"}
    assert config.blobs == str(tmp_path / "artifacts")
    app = create_app(settings_of(tiny_base, tmp_path), tiny_base)
    assert app.state.start_failure is None and isinstance(ProcessEngineClient(config), ProcessEngineClient)


@pytest.fixture
def tree(tmp_path: Path, loras: list[Path]) -> Path:
    """Two good folders and several that are none."""
    made = tmp_path / "tree"
    for name, folder in zip(("First", "second"), loras, strict=False):
        shutil.copytree(folder, made / name)
    (made / "first-notes").mkdir()
    (made / "README.md").write_text("not a folder")
    shutil.copytree(loras[2], made / "broken")
    (made / "broken" / WEIGHTS).write_bytes(b"x")
    shutil.copytree(loras[2], made / "no name!")
    shutil.copytree(loras[2], made / "base")
    (made / "json").mkdir()
    (made / "json" / CONFIG).write_text("[" * 100_000)
    return made


async def test_import(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every good folder of the tree is a task; a bad one is one line that names it, and not fatal."""
    caplog.set_level(logging.INFO)
    async with open_site(tiny_base, tmp_path / "data", import_=tree) as site:
        tasks = (await site.http.get("/tasks")).json()["tasks"]
        assert [task["task"] for task in tasks] == ["base", "first", "second"]
        assert tasks[1]["versions"][0]["note"] == "imported from First"
        assert (await site.ask("first", prompt="a"))["adapter"]["version"] == 1
        assert len(site.stored()) == 2
    refused = [record for record in caplog.records if record.levelname == "ERROR"]
    assert sorted(Path(vars(record)["folder"]).name for record in refused) == ["base", "broken", "json", "no name!"]
    assert all(vars(record)["reason"] and not record.exc_info for record in refused)
    assert {"folder", "reason"} <= set(json.loads(json.dumps(vars(refused[0]), default=str)))


async def test_import_again(anyio_backend: str, tiny_base: Path, tmp_path: Path, tree: Path, zips: list[bytes]) -> None:
    """The next start imports only tasks that were never there: a task keeps its versions, or stays deleted."""
    async with open_site(tiny_base, tmp_path / "data", import_=tree) as site:
        await site.upload("first", zips[2])
        await site.http.delete("/tasks/second")
    async with open_site(tiny_base, tmp_path / "data", import_=tree) as site:
        assert (await site.ask("first", prompt="a"))["adapter"]["version"] == 2
        assert (await site.http.get("/tasks/second")).status_code == 404


async def test_import_of_what_adapterhub_saved(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A tree of AdapterHub's folders is taken in as one of PEFT's is, and kept under PEFT's names."""
    async with open_site(tiny_base, tmp_path / "data", import_=HERE / "llama") as site:
        tasks = (await site.http.get("/tasks")).json()["tasks"]
        assert {task["task"] for task in tasks} == {"base", *(folder.name for folder in (HERE / "llama").iterdir())}
        assert {tasks[1]["versions"][0]["method"], tasks[-1]["versions"][0]["method"]} == {"bottleneck"}
        assert (await site.ask("houlsby", prompt="a"))["adapter"]["version"] == 1


async def test_import_of_nothing(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A tree that is no folder is refused at start, for it is surely a slip; an empty one is fine."""
    (tmp_path / "empty").mkdir()
    engine = Watched(tiny_base)
    said = await failure_of(tiny_base, tmp_path / "data", engine, import_=tmp_path / "none")
    assert "--import takes a folder" in said and engine.calls[-1] == "close"
    async with open_site(tiny_base, tmp_path / "data", import_=tmp_path / "empty"):
        pass


async def test_import_while_the_engine_dies(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that dies while a tree is taken in costs time alone: the folders come in when it is back."""
    monkeypatch.setattr(preload, "FIRST_WAIT_S", 0.01)
    engine = FakeEngineClient(ready_of(tiny_base))

    async def start() -> Ready:
        engine.die()
        return ready_of(tiny_base)

    monkeypatch.setattr(engine, "start", start)
    async with open_site(tiny_base, tmp_path / "data", engine, import_=tree) as site:
        assert site.state.imports.num_pending == 4 and site.state.stores.blobs.digests() == set()
        engine.revive()
        await until(lambda: site.state.imports.num_pending == 0)
        assert len((await site.http.get("/tasks")).json()["tasks"]) == 3


async def test_records_are_kept_for_their_days(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """A server that starts deletes the changes that are older than `--keep-audit-days`, and the usage of what is gone.

    The usage of what is there stays, however old, and a line says so only if something was deleted.
    """
    caplog.set_level(logging.INFO)
    async with open_site(tiny_base, tmp_path) as site:
        site.state.stores.tenants.add("acme")
        for task in ("stays", "goes"):
            await site.upload(task, zips[0])
            await site.ask(task, prompt="a")
        await site.ask(prompt="a")
        await site.http.delete("/tasks/goes")
    with sqlite3.connect(tmp_path / "registry.db") as database:
        database.execute("UPDATE audit SET at = at - 3 * 86400")
        database.execute("UPDATE usage SET last = last - 3 * 86400")
    for days, kept in ((4, {"base", "goes", "stays"}), (2, {"base", "stays"})):
        async with open_site(tiny_base, tmp_path, keep_audit_days=days) as site:
            stores = site.state.stores
            await until(
                lambda stores=stores, kept=kept: {used.task for used in stores.registry.usage("default")} == kept
            )
            assert bool(stores.tenants.changes("acme", None, 9)) is (days == 4)
    told = [record.__dict__ for record in caplog.records if record.message == "old changes and usage were deleted"]
    assert [(line["num_changes"] > 0, line["num_usages"]) for line in told] == [(True, 1)]
