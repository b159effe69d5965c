"""Routes over HTTP: canary, sticky users, rollback, pins; no request is dropped or mixed by a change."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.server.world import Site, error_of, open_site

pytestmark = pytest.mark.anyio


@pytest.fixture
async def routed(site: Site, zips: list[bytes]) -> Site:
    """A server with the versions 1, 2 and 3 of the task a; 3 is its route."""
    for body in zips:
        assert (await site.upload("a", body)).status_code == 201
    return site


async def put(site: Site, path: str, **body: Any) -> dict[str, Any]:
    answer = await site.http.put(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def version(site: Site, **body: Any) -> int:
    """The version that answers a request."""
    found = await site.ask("a", prompt="x", max_tokens=1, **body)
    number: int = found["adapter"]["version"]
    return number


async def test_a_canary(routed: Site) -> None:
    """Requests fall by the weights, on every door, and the answer says which version it is of."""
    task = await put(routed, "/tasks/a/route", versions={"1": 1, "3": 1})
    assert task["route"] == {"versions": {"1": 1, "3": 1}, "sticky": None} and task["task"] == "a"
    assert set(Counter([await version(routed) for _ in range(40)])) == {1, 3}
    adapters = {adapter.digest for adapter in [submit.adapters[0] for submit in routed.engine.submitted]}
    assert adapters == {task["versions"][0]["digest"], task["versions"][2]["digest"]}
    assert await version(routed, version=2) == 2, "a version that is named is no matter of the route"


async def test_a_user_stays(routed: Site) -> None:
    """A sticky route gives the same user the same version by /generate, /v1 and among several adapters."""
    await put(routed, "/tasks/a/route", versions={"1": 50, "3": 50}, sticky="user")
    got = {user: {await version(routed, user=user) for _ in range(4)} for user in "abcdefgh"}
    assert all(len(numbers) == 1 for numbers in got.values()) and len(set(map(tuple, got.values()))) == 2
    for user in "abcd":
        routed.engine.submitted.clear()
        for path, more in (
            ("completions", {"prompt": "x"}),
            ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            answer = await routed.post(f"/v1/{path}", {"model": "a", "user": user, "max_tokens": 1, **more})
            assert answer.status_code == 200, answer.text
        await routed.post("/generate", {"adapters": [{"task": "a"}], "user": user, "prompt": "x", "max_tokens": 1})
        await version(routed, user=user)
        assert len(routed.engine.submitted) == 4
        assert len({submit.adapters[0].digest for submit in routed.engine.submitted}) == 1


async def test_a_rollback(routed: Site) -> None:
    """The route before this one, step by step; at the end of the way 409, and the route stays."""
    await put(routed, "/tasks/a/route", versions={"2": 95, "3": 5})
    for wanted in ({"3": 100}, {"2": 100}, {"1": 100}):
        answer = await routed.http.post("/tasks/a/rollback")
        assert (answer.status_code, answer.json()["route"]["versions"]) == (200, wanted)
        assert str(await version(routed)) in wanted
    answer = await routed.http.post("/tasks/a/rollback")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "conflict")
    assert await version(routed) == 1


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"versions": {"9": 1}}, 404, "task"),
        ({"versions": {}}, 422, "versions"),
        ({}, 422, "versions"),
        ({"versions": {"1": 0}}, 422, "versions.1"),
        ({"versions": {"1": -1}}, 422, "versions.1"),
        ({"versions": {"1": "5"}}, 422, "versions.1"),
        ({"versions": {"x": 1}}, 422, "versions.x"),
        ({"versions": {"01": 1}}, 422, "versions.01"),
        ({"versions": {"9" * 30: 1}}, 422, f"versions.{'9' * 30}"),
        ({"versions": {str(number): 1 for number in range(1, 70)}}, 422, "versions"),
        ({"versions": {"1": 1}, "sticky": "ip"}, 422, "sticky"),
        ({"versions": {"1": 1}, "more": 1}, 422, "more"),
    ],
)
async def test_a_route_that_is_none(routed: Site, body: dict[str, Any], status: int, param: str) -> None:
    """A route with a fault is refused with its field, and what is served stays."""
    answer = await routed.http.put("/tasks/a/route", json=body)
    assert (answer.status_code, error_of(answer)["param"]) == (status, param)
    assert await version(routed) == 3


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/tasks/{}/route", {"versions": {"1": 1}}),
        ("POST", "/tasks/{}/rollback", None),
        ("PUT", "/tasks/{}/pin", {"pinned": True}),
    ],
)
async def test_no_such_task(routed: Site, method: str, path: str, body: Any) -> None:
    """An absent task or version is 404; the base has no routes and no pins: 422."""
    for task, status in (("b", 404), ("base", 422)):
        answer = await routed.http.request(method, path.format(task), json=body)
        assert (answer.status_code, error_of(answer)["param"]) == (status, "task")


async def test_a_pin_follows_the_route(anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]) -> None:
    """The engine is told what pinned tasks route to: after every change, and after a restart."""
    async with open_site(tiny_base, tmp_path) as site:
        first, second = [(await site.upload("a", body)).json()["digest"] for body in zips[:2]]
        assert (await put(site, "/tasks/a/pin", pinned=True))["pinned"] is True
        assert site.engine.resident == [second]
        await put(site, "/tasks/a/route", versions={"1": 1})
        assert site.engine.resident == [first]
        third = (await site.upload("a", zips[2])).json()["digest"]
        assert site.engine.resident == [third]
        await site.http.post("/tasks/a/rollback")
        assert site.engine.resident == [first]
    async with open_site(tiny_base, tmp_path) as site:
        assert site.engine.resident == [first] and (await site.http.get("/tasks/a")).json()["pinned"]
        await site.http.delete("/tasks/a/versions/1")
        assert site.engine.resident == []
        await put(site, "/tasks/a/route", versions={"2": 1})
        assert (await put(site, "/tasks/a/pin", pinned=False))["pinned"] is False
        assert site.engine.resident == []


@pytest.mark.parametrize("is_stream", [False, True])
async def test_moved_between_resolution_and_start(
    routed: Site, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    """A request whose version is deleted before it begins is answered by that of the route as it is now, and counted
    once; if it named the version it is 404."""
    resolver, calls = routed.state.generation.resolver, iter(range(99))
    resolve = resolver.version

    async def resolved(*args: Any) -> Any:
        found = await resolve(*args)
        if next(calls) == 0:
            await put(routed, "/tasks/a/route", versions={"1": 1})
            assert (await routed.http.delete("/tasks/a/versions/3")).status_code == 204
        return found

    monkeypatch.setattr(resolver, "version", resolved)
    if is_stream:
        assert (await routed.events("/generate?task=a", prompt="x"))[0]["adapter"]["version"] == 1
    else:
        assert await version(routed) == 1
    assert (
        'manyhats_requests_total{status="200",task="a",tenant="default"} 1.0' in routed.state.metrics.render().decode()
    )
    assert 'status="404",task="a"' not in routed.state.metrics.render().decode()
    calls = iter(range(99))
    monkeypatch.setattr(resolver, "version", resolve)
    assert (await routed.post("/generate?task=a", {"prompt": "x", "version": 3})).status_code == 404


async def test_swaps_and_requests_at_once(routed: Site) -> None:
    """Every request of a task is answered while routes change, versions come and old ones are deleted: 0 lost."""

    async def change() -> None:
        for turn in range(12):
            await put(routed, "/tasks/a/route", versions={str(1 + turn % 2): 1, "3": 2})
            await asyncio.sleep(0)
        await put(routed, "/tasks/a/route", versions={"1": 1})
        for number in (3, 2):
            assert (await routed.http.delete(f"/tasks/a/versions/{number}")).status_code == 204
            await asyncio.sleep(0)

    async def ask() -> None:
        while not changing.done():
            await version(routed)

    changing = asyncio.create_task(change())
    await asyncio.gather(changing, *(ask() for _ in range(6)))
    assert await version(routed) == 1 and routed.state.retention.is_idle


async def test_what_was_deleted_is_not_imported_again(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, loras: list[Path], zips: list[bytes]
) -> None:
    """A task that came by --import and was deleted stays deleted at the next start; other bytes, and an upload, bring
    it back."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").symlink_to(loras[0])
    for step in ("taken in", "deleted", "stays deleted"):
        async with open_site(tiny_base, tmp_path / "data", import_=tree) as site:
            found = (await site.http.get("/tasks/a")).status_code
            assert found == (404 if step == "stays deleted" else 200), step
            if step == "deleted":
                assert (await site.http.delete("/tasks/a")).status_code == 204
    (tree / "a").unlink()
    (tree / "a").symlink_to(loras[1])
    async with open_site(tiny_base, tmp_path / "data", import_=tree) as site:
        assert (await site.http.get("/tasks/a")).json()["versions"][0]["version"] == 2
        assert (await site.upload("a", zips[0])).status_code == 201
