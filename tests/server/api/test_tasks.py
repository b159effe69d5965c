"""Tasks: versions and their residency; deleted for new requests at once, and never under a running one."""

from __future__ import annotations

import asyncio
import io
import threading
import time
import zipfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from adapters_store.format.folder import CONFIG, FILES, WEIGHTS
from adapters_store.registry.registry import Usage
from adapters_store.registry.tenants import TenantLimits
from server.api import tasks
from server.api.tasks import MAX_BRIEF
from server.requests.version_stats import RequestOutcome, summary
from tests.adapters_store.registry.test_registry import add
from tests.server.world import Site, error_of, serve_site, until

pytestmark = pytest.mark.anyio


async def test_what_a_task_is(site: Site, zips: list[bytes]) -> None:
    """A task shows its versions, route, residency and use; the list has the base first, and then all tasks."""
    first = (await site.upload("a", zips[0])).json()
    second = (await site.upload("a", zips[1], note="better")).json()
    await site.upload("b", zips[2], activate="false")
    await site.ask("a", prompt="xyz", max_tokens=2)
    await site.ask("base", prompt="xy", max_tokens=1, n=2)
    site.state.usage.flush(site.state.stores.registry)
    site.engine.states[first["digest"]] = "host"
    task = (await site.http.get("/tasks/a")).json()
    assert set(task) == {"task", "versions", "route", "pinned", "num_versions"}
    assert task["route"] == {"versions": {"2": 100}, "sticky": None}
    sizes = {"num_parameters", "bytes", "slot_bytes", "virtual_tokens"}
    kept = {"version", "digest", "method", "note", "created", "residency", "use", "recent", *sizes}
    assert all(set(version) == kept for version in task["versions"])
    assert all(version["slot_bytes"] == 4 * version["num_parameters"] for version in task["versions"])
    assert [version["digest"] for version in task["versions"]] == [first["digest"], second["digest"]]
    assert [version["residency"] for version in task["versions"]] == ["host", "slot"]
    assert task["versions"][1]["use"] == {"requests": 1, "prompt_tokens": 3, "completion_tokens": 2}
    tasks = (await site.http.get("/tasks")).json()["tasks"]
    assert [found["task"] for found in tasks] == ["base", "a", "b"]
    assert tasks[0]["use"] == {"requests": 1, "prompt_tokens": 2, "completion_tokens": 2}
    assert tasks[1] == task
    assert (tasks[2]["route"], tasks[2]["versions"][0]["residency"]) == ({"versions": {}, "sticky": None}, "disk")
    assert (await site.http.get("/tasks/base")).json() == tasks[0]


async def test_a_page_reads_what_it_shows(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many versions were used, the usage that is read for tasks is that of the versions shown, and the base."""
    registry, num_read = site.state.stores.registry, list[int]()
    for number in range(MAX_BRIEF + 5):
        add(registry, f"{number:064}", "a")
    registry.add_usages({("default", "a", 1 + number): (1, 2, 3) for number in range(MAX_BRIEF + 5)})
    usage = registry.usage

    def counted(*args: Any) -> list[Usage]:
        found = usage(*args)
        num_read.append(len(found))
        return found

    monkeypatch.setattr(registry, "usage", counted)
    for path in ("/tasks", "/tasks/a?limit=3", "/tasks/base"):
        answer = (await site.http.get(path)).json()
        shown = [version for task in answer.get("tasks", [answer]) for version in task["versions"]]
        assert num_read.pop() == sum(version["use"]["requests"] for version in shown) == len(shown), path


async def test_a_task_that_routes_nowhere(site: Site, zips: list[bytes]) -> None:
    """A task whose only version stands by answers 404, never the base; its version can be named."""
    await site.upload("a", zips[0], activate="false")
    answer = await site.post("/generate?task=a", {"prompt": "x"})
    assert answer.status_code == 404 and "name a version" in error_of(answer)["message"]
    assert (await site.ask("a", prompt="x", version=1))["adapter"]["version"] == 1


async def test_delete_a_task(site: Site, zips: list[bytes]) -> None:
    """A deleted task is 404 at once, everywhere; its artifacts go, and the engine forgets them."""
    digests = [(await site.upload("a", body)).json()["digest"] for body in zips[:2]]
    await site.upload("b", zips[0])
    assert (await site.http.delete("/tasks/a")).status_code == 204
    for path in ("/tasks/a", "/tasks/a/versions/1/artifact"):
        assert (await site.http.get(path)).status_code == 404
    assert (await site.post("/generate?task=a", {"prompt": "x"})).status_code == 404
    assert (await site.http.delete("/tasks/a")).status_code == 404
    assert site.stored() == {digests[0]}, "the other task's artifact stays"
    assert site.engine.discarded == [digests[1]]
    assert (await site.ask("b", prompt="x"))["adapter"]["digest"] == digests[0]


async def test_delete_a_version(site: Site, zips: list[bytes]) -> None:
    """A deleted version is gone, also from the route; the others stay."""
    digests = [(await site.upload("a", body)).json()["digest"] for body in zips[:2]]
    assert (await site.http.delete("/tasks/a/versions/2")).status_code == 204
    assert site.stored() == {digests[0]}
    assert (await site.http.get("/tasks/a")).json()["route"]["versions"] == {}
    assert (await site.post("/generate?task=a", {"prompt": "x"})).status_code == 404
    assert (await site.ask("a", prompt="x", version=1))["adapter"]["digest"] == digests[0]
    assert (await site.http.delete("/tasks/a/versions/2")).status_code == 404


async def test_uploaded_while_it_is_deleted(site: Site, zips: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes whose last version is deleted between their storing and their registering are not deleted with it."""
    digest = (await site.upload("a", zips[0])).json()["digest"]
    add_version, stored = site.state.stores.registry.add_version, threading.Event()

    def slow(*args: Any, **values: Any) -> Any:
        stored.set()
        time.sleep(0.3)  # long enough for the deletion, were it let through
        return add_version(*args, **values)

    monkeypatch.setattr(site.state.stores.registry, "add_version", slow)
    uploading = asyncio.create_task(site.upload("b", zips[0]))
    await until(stored.is_set)
    assert (await site.http.delete("/tasks/a")).status_code == 204
    assert (await uploading).status_code == 201
    assert site.stored() == {digest}
    assert (await site.ask("b", prompt="x"))["adapter"]["digest"] == digest


async def test_upload_after_deletion(site: Site, zips: list[bytes]) -> None:
    """The same bytes after a deletion are a new version with a new number."""
    await site.upload("a", zips[0])
    await site.http.delete("/tasks/a")
    answer = await site.upload("a", zips[0])
    assert (answer.status_code, answer.json()["version"]) == (201, 2)
    assert (await site.ask("a", prompt="x"))["adapter"]["version"] == 2


@pytest.mark.parametrize("path", ["/tasks/a/versions/0", "/tasks/a/versions/-1", f"/tasks/a/versions/{10**30}"])
async def test_no_such_version(site: Site, zips: list[bytes], path: str) -> None:
    """A version that is not there is 404, for deletion and download, by any number."""
    await site.upload("a", zips[0])
    assert (await site.http.delete(path)).status_code == 404
    assert (await site.http.get(f"{path}/artifact")).status_code == 404


@pytest.mark.parametrize("number", ["one", "1.5", "9" * 5000, "%00"])
async def test_a_version_that_is_no_number(site: Site, number: str) -> None:
    """A version that is no number is 422."""
    answer = await site.http.delete(f"/tasks/a/versions/{number}")
    assert (answer.status_code, error_of(answer)["param"]) == (422, "number")


async def test_the_base_stays(site: Site) -> None:
    """The base cannot be deleted."""
    for path in ("/tasks/base", "/tasks/base/versions/1"):
        answer = await site.http.delete(path)
        assert (answer.status_code, error_of(answer)["param"]) == (422, "task")


async def test_download(site: Site, zips: list[bytes], loras: list[Path]) -> None:
    """The artifact comes back as a zip whose files are byte-equal to those that were sent."""
    digest = (await site.upload("a", zips[0])).json()["digest"]
    answer = await site.http.get("/tasks/a/versions/1/artifact")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/zip")
    assert answer.headers["etag"] == f'"{digest}"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    assert found == {name: (loras[0] / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    assert (await site.upload("a", answer.content)).status_code == 200
    assert site.stored() == {digest}


async def test_download_of_what_is_damaged(site: Site, zips: list[bytes]) -> None:
    """An artifact whose bytes have changed on the disk is 503 and says so; one that is lost is 404."""
    digest = (await site.upload("a", zips[0])).json()["digest"]
    path = site.state.stores.blobs.path(digest)
    (path / CONFIG).write_text((path / CONFIG).read_text() + " ")
    answer = await site.http.get("/tasks/a/versions/1/artifact")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "artifact_corrupt")
    for name in FILES:
        (path / name).unlink(missing_ok=True)
    path.rmdir()
    assert (await site.http.get("/tasks/a/versions/1/artifact")).status_code == 404


async def test_a_running_stream_finishes(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]
) -> None:
    """A stream that runs when its task is deleted finishes with what it began with; then the artifact goes.

    A second stream that ends earlier does not take the artifact away from the first.
    """
    async with serve_site(tiny_base, tmp_path) as site:
        digest = (await site.upload("a", zips[0])).json()["digest"]
        site.engine.delay_s = 0.01
        long = asyncio.create_task(site.ask("a", prompt="x" * 60))
        short = asyncio.create_task(site.ask("a", prompt="x" * 20))
        await until(lambda: len(site.engine.submitted) == 2)
        assert (await site.http.delete("/tasks/a")).status_code == 204
        assert (await site.post("/generate?task=a", {"prompt": "x"})).status_code == 404
        assert len((await short)["choices"][0]["token_ids"]) == 21
        assert site.stored() == {digest} and not site.engine.discarded
        assert len((await long)["choices"][0]["token_ids"]) == 61
        await until(lambda: not site.state.stores.blobs.digests())
        assert site.engine.discarded == [digest]
        assert site.state.retention.is_idle


async def test_uploaded_again_while_it_runs(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]
) -> None:
    """Bytes that are deleted and uploaded again while a request uses them stay when it ends."""
    async with serve_site(tiny_base, tmp_path) as site:
        digest = (await site.upload("a", zips[0])).json()["digest"]
        site.engine.delay_s = 0.01
        running = asyncio.create_task(site.ask("a", prompt="x" * 30))
        await until(lambda: site.engine.submitted)
        await site.http.delete("/tasks/a")
        assert (await site.upload("a", zips[0])).json()["version"] == 2
        await running
        assert site.stored() == {digest} and not site.engine.discarded


async def test_deleted_between_resolution_and_start(
    site: Site, zips: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that is deleted after a request was resolved and before it runs is 404: it never reaches the engine."""
    await site.upload("a", zips[0])
    resolver = site.state.generation.resolver
    resolve = resolver.version
    calls = iter(range(9))

    async def resolved(*args: Any) -> Any:
        found = await resolve(*args)
        if next(calls) == 0:
            assert (await site.http.delete("/tasks/a")).status_code == 204
        return found

    monkeypatch.setattr(resolver, "version", resolved)
    answer = await site.post("/generate?task=a", {"prompt": "x"})
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")
    assert not site.engine.submitted


async def test_worn_while_it_is_buried(site: Site, zips: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that comes while its artifact is about to be deleted keeps it; when it ends the artifact goes."""
    digest = (await site.upload("a", zips[0])).json()["digest"]
    version, digests = site.state.stores.registry.resolve("default", "a"), site.state.stores.registry.digests
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    began: list[Future[None]] = []

    async def request() -> None:
        async with site.state.retention.using("default", [version]):
            await ended.wait()

    def referenced() -> set[str]:  # runs in a thread between the deletion of the version and that of the artifact
        if not began:
            began.append(asyncio.run_coroutine_threadsafe(request(), loop))
            while not site.state.retention.is_held(digest):
                time.sleep(0.001)
        return digests()

    monkeypatch.setattr(site.state.stores.registry, "digests", referenced)
    assert (await site.http.delete("/tasks/a")).status_code == 204
    assert site.stored() == {digest}
    ended.set()
    await asyncio.wrap_future(began[0])
    assert site.stored() == set()


async def test_a_deletion_that_the_disk_refuses(
    site: Site, zips: list[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A task is gone even if its artifact cannot be removed yet, and the log says that this is tried again."""

    def broken(_digest: str) -> None:
        raise OSError("no")

    await site.upload("a", zips[0])
    monkeypatch.setattr(site.state.stores.blobs, "delete", broken)
    assert (await site.http.delete("/tasks/a")).status_code == 204
    assert "tried again" in caplog.text


async def test_deletions_and_requests_at_once(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]
) -> None:
    """However uploads, deletions and requests interleave: each request is 200 or 404, and nothing is left over."""
    async with serve_site(tiny_base, tmp_path) as site:
        site.engine.delay_s = 0.001

        async def turn(number: int) -> int:
            if number % 5 == 0:
                return (await site.upload("a", zips[number % 3])).status_code
            if number % 5 == 3:
                return (await site.http.delete("/tasks/a")).status_code
            return (await site.post("/generate?task=a", {"prompt": "xyz"})).status_code

        statuses = await asyncio.gather(*(turn(number) for number in range(60)))
        assert set(statuses) <= {200, 201, 204, 404}
        await site.http.delete("/tasks/a")
        await until(lambda: not site.state.stores.blobs.digests())
        assert site.state.retention.is_idle


async def test_tasks_by_pages(site: Site, zips: list[bytes]) -> None:
    """Pages of tasks and of a task's versions have all of them in order; versions of the route are always there."""
    registry = site.state.stores.registry
    for name in ("a", "b", "c", "d"):
        for number in range(25):
            add(registry, f"{name}{number:03d}".rjust(64, "0"), name, activate=number == 1)
    pages: list[list[dict[str, Any]]] = []
    after: str | None = ""
    while after is not None:
        page = (await site.http.get(f"/tasks?limit=2{after and f'&after={after}'}")).json()
        pages.append(page["tasks"])
        after = page["next"]
    assert [[task["task"] for task in tasks] for tasks in pages] == [["base", "a", "b"], ["c", "d"]]
    for task in pages[1]:
        assert [version["version"] for version in task["versions"]] == [2, *range(6, 26)] and task["num_versions"] == 25
    whole = (await site.http.get("/tasks/a?limit=200")).json()
    assert [version["version"] for version in whole["versions"]] == list(range(1, 26))
    part = (await site.http.get("/tasks/a?limit=3&before=10")).json()
    assert [version["version"] for version in part["versions"]] == [2, 7, 8, 9]
    models = (await site.http.get("/v1/models?limit=3")).json()
    assert [model["id"] for model in models["data"]] == ["base", "a", "b", "c"] and models["has_more"]
    models = (await site.http.get("/v1/models?after=c")).json()
    assert [model["id"] for model in models["data"]] == ["d"] and not models["has_more"]


async def test_a_list_of_many_costs_little_in_the_event_loop(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many versions were used, a list asks the database a fixed number of times and writes out one page."""
    registry, engine = site.state.stores.registry, site.state.stores.registry.engine
    statements: list[str] = []
    threads: list[threading.Thread] = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))

    def seen(outcomes: list[RequestOutcome]) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return summary(outcomes)

    monkeypatch.setattr(tasks, "summary", seen)
    counts = []
    for num_tasks in (5, 60):
        for number in range(num_tasks):
            version, _ = add(registry, f"{number:064d}", f"t{number}")
            registry.add_usages({("default", f"t{number}", version.number): (1, 1, 1)})
        asked = []
        for _ in range(5):
            statements.clear()
            assert len((await site.http.get("/tasks?limit=50")).json()["tasks"]) == min(num_tasks, 50) + 1
            asked.append(sum("FROM" in statement for statement in statements))
        counts.append(min(asked))  # what the server's own work asks meanwhile (usage, retention) only adds
    assert counts[0] == counts[1] < 12
    assert len(threads) == 5 * 55 and threading.main_thread() not in threads


async def test_looking_takes_nothing_of_the_rate(site: Site) -> None:
    """A tenant that lists tasks and models as often as it may is still let in to generate, as often as it may."""
    site.state.stores.tenants.set_limits("default", TenantLimits(requests_per_minute=3))
    site.state.callers.clear_cache("default")
    for path in ("/tasks", "/v1/models", "/tasks/base"):
        assert (await site.http.get(path)).status_code == 200
    assert (await site.http.get("/tasks")).status_code == 429, "looks have a bound of their own"
    for _ in range(3):
        await site.ask(prompt="x", max_tokens=1)
    assert (await site.post("/generate?task=base", {"prompt": "x"})).status_code == 429


async def test_every_route_counts(site: Site) -> None:
    """Each route of a tenant's own things counts a request before it reads it: the one too many is 429."""
    site.state.stores.tenants.set_limits("default", TenantLimits(requests_per_minute=1))
    site.state.callers.clear_cache("default")
    counted = [
        (verb, path)
        for path, verbs in site.app.openapi()["paths"].items()
        for verb, operation in verbs.items()
        if "429" in operation["responses"] and operation["tags"] != ["Tenants"]  # these are free for the operator
    ]
    assert {("post", "/"), ("post", "/generate_stream"), ("post", "/v1/responses"), ("post", "/score")} < {*counted}
    for verb, path in counted:
        site.state.rate_limiter.forget("default")
        url = path.replace("{number}", "1").replace("{", "").replace("}", "")
        first, second = [await site.http.request(verb, url) for _ in range(2)]
        assert first.status_code != 429 and second.status_code == 429, (verb, path)
        assert error_of(second)["param"] == "requests_per_minute"
