"""Deletion: whatever is deleted, with whatever it is deleted, the same steps follow; one that fails is made again."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import Request

from adapters_store.errors import RegistryHeldError, StoreDownError
from server.api.deps import refuse_unknown_query
from server.requests.resolve import ResolvedAdapters
from server.requests.spec import GenerationSpec
from server.requests.usage import EVERY_S, MAX_RETRY_S, UsageBuffer
from server.uploads import retention
from tests.kit.metrics import Reading
from tests.server.api.test_hang import BODIES
from tests.server.api.test_tenants import KEY, Clock
from tests.server.world import Site, error_of, open_site, until

pytestmark = pytest.mark.anyio
ADMIN = {"Authorization": f"Bearer {KEY}"}
ACME = {**ADMIN, "X-Tenant": "acme"}
WAYS = ("/tasks/{task}", "/tasks/{task}/versions/{number}", "/tenants/{tenant}")


@pytest.fixture
async def pinned(anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]) -> AsyncIterator[Site]:
    """A server whose tenant `acme` has the task `a` with one version, which is pinned."""
    async with open_site(tiny_base, tmp_path, admin_key=KEY) as site:
        await site.http.post("/tenants", json={"name": "acme"}, headers=ADMIN)
        kind = {"Content-Type": "application/zip"}
        assert (await site.http.post("/adapters?task=a", content=zips[0], headers=ACME | kind)).status_code == 201
        assert (await site.http.put("/tasks/a/pin", json={"pinned": True}, headers=ACME)).status_code == 200
        assert len(site.engine.resident) == 1
        yield site


async def delete(site: Site, way: str) -> httpx2.Response:
    """Delete the task's one version in a way."""
    return await site.http.delete(
        way.format(task="a", number=1, tenant="acme"), headers=ACME if "task" in way else ADMIN
    )


async def test_every_way_is_here(pinned: Site) -> None:
    """These are all routes that delete versions; the only others delete keys."""
    deleting = [path for path, verbs in pinned.app.openapi()["paths"].items() if "delete" in verbs]
    assert {path for path in deleting if "{key_id}" not in path} == set(WAYS)


@pytest.mark.parametrize("way", WAYS)
async def test_all_steps_follow_every_deletion(pinned: Site, way: str) -> None:
    """The artifact goes, and the engine drops it and is not told any more to keep it in a slot."""
    (digest,) = pinned.engine.resident
    assert (await delete(pinned, way)).status_code == 204
    assert pinned.engine.resident == [] and pinned.engine.discarded == [digest]
    assert pinned.stored() == set() and pinned.state.retention.is_idle


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", ["pinned_digests", "digests", "delete"])
async def test_a_step_that_fails_is_made_again(
    pinned: Site, way: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deletion is answered as made even if a step after it fails; the step is made again, and counted as a retry."""
    monkeypatch.setattr(retention, "FIRST_RETRY_S", 0.01)
    stores = pinned.state.stores
    thing = stores.blobs if step == "delete" else stores.registry

    def away(*_arguments: object) -> None:
        raise StoreDownError("away") if step == "delete" else RegistryHeldError("locked")

    retrying = asyncio.create_task(pinned.state.retention.keep_retrying())
    with monkeypatch.context() as patch:
        patch.setattr(thing, step, away)
        assert (await delete(pinned, way)).status_code == 204
        await until(lambda: retries(pinned) > 0)
    stores.storage._recover()
    await until(lambda: pinned.state.retention.is_idle and pinned.engine.resident == [])
    assert pinned.stored() == set()
    retrying.cancel()


async def test_an_upload_that_outlasts_its_tenant(
    pinned: Site, zips: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload whose tenant is deleted while it is checked or stored is 404, and nothing of it stays."""
    register, headers = pinned.state.uploads.register, {**ACME, "Content-Type": "application/zip"}

    async def late(*arguments: Any) -> Any:
        assert (await delete(pinned, "/tenants/{tenant}")).status_code == 204
        return await register(*arguments)

    monkeypatch.setattr(pinned.state.uploads, "register", late)
    answer = await pinned.http.post("/adapters?task=b", content=zips[1], headers=headers)
    assert (answer.status_code, error_of(answer)["param"]) == (404, "X-Tenant")
    assert pinned.stored() == set() and pinned.state.retention.is_idle


def retries(site: Site) -> float:
    """How often a step of retention was made again."""
    return Reading.of(site.state.metrics.render().decode()).value("manyhats_retries_total", what="retention")


async def test_usage_that_cannot_be_written_waits_longer_each_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Usage that the registry refuses is tried again after a wait that doubles to a minute, whoever asks for it."""
    clock, tries = Clock(), []

    def refuse(*_arguments: object) -> None:
        tries.append(clock.now)
        raise OSError("no")

    monkeypatch.setattr(site.state.stores.registry, "add_usages", refuse)
    usage = UsageBuffer(site.state.metrics, clock)
    usage._add(("default", "base", 0), [1, 1, 1])
    for _ in range(300):
        await usage.wait_until_durable(site.state.stores)
        clock.now += EVERY_S
    waits = [after - before for before, after in pairwise(tries)]
    assert waits[:6] == [1, 2, 4, 8, 16, 32] and set(waits[6:]) == {MAX_RETRY_S}


def mentions(root: object, word: str) -> list[str]:
    """Paths from an object, through attributes and collections of what the server made, to a text with a word."""
    found, seen, left = [], set[int](), [("", root)]
    while left:
        path, thing = left.pop()
        if isinstance(thing, str):
            found += [path] if word in thing else []
            continue
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, dict):
            left += [(f"{path}[{key!r}]", part) for key, value in thing.items() for part in (key, value)]
        elif isinstance(thing, list | tuple | set | frozenset | deque):
            left += [(f"{path}[]", part) for part in thing]
        elif type(thing).__module__.startswith(("server.", "adapters_store.")):
            left += [(f"{path}.{name}", getattr(thing, name, None)) for name in attributes_of(thing)]
    return found


def attributes_of(thing: object) -> list[str]:
    """The names of an object's attributes, in its dictionary and in its slots."""
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*getattr(thing, "__dict__", {}), *slots]


async def test_no_room_remembers_a_tenant_that_is_gone(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]
) -> None:
    """Whatever was done for a tenant, after its deletion no room of the server has its name in memory."""
    word = "gonetenant"
    theirs = {**ADMIN, "X-Tenant": word}
    async with open_site(tiny_base, tmp_path, admin_key=KEY) as site:
        limits = {"requests_per_minute": 1000, "tokens_per_minute": 100000, "max_queued": 10}
        await site.http.post("/tenants", json={"name": word, "limits": limits}, headers=ADMIN)
        await site.http.post(f"/tenants/{word}/keys", json={"scope": "generate"}, headers=ADMIN)
        kind = {"Content-Type": "application/zip"}
        assert (await site.http.post("/adapters?task=a", content=zips[0], headers=theirs | kind)).status_code == 201
        for task in ("a", "base", "absent"):
            await site.http.post(f"/generate?task={task}", json={"prompt": "b"}, headers=theirs)
        known = " ".join(mentions(site.state, word))
        assert all(room in known for room in ("_outcomes", "_usages", "_metrics")), known
        assert (await site.http.delete(f"/tenants/{word}", headers=ADMIN)).status_code == 204
        site.engine.submitted.clear()  # of the test's engine alone
        assert mentions(site.state, word) == []


LATE = "X-Late"  # the header of a request whose tenant, task or version is deleted once its headers were read
OPEN = ("/health", "/docs")
GENERATING: dict[tuple[str, str], dict[str, Any]] = {  # and how a body names the task
    ("post", "/v1/completions"): {"model": "a"},
    ("post", "/v1/chat/completions"): {"model": "a"},
    ("post", "/v1/responses"): {"model": "a"},
    ("post", "/"): {"parameters": {"adapter_id": "a"}},
    ("post", "/generate_stream"): {"parameters": {"adapter_id": "a"}},
}


def requests_of(site: Site, zips: list[bytes]) -> list[tuple[str, str, dict[str, Any]]]:
    """Every route that knows its caller, with a body that it takes: verb, path and what `httpx2` sends."""
    paths = site.app.openapi()["paths"]
    names = {"task": "a", "number": "1", "name": "a", "tenant": "other", "key_id": "mh_aaaaaaaaaaaa"}
    found: list[tuple[str, str, dict[str, Any]]] = []
    for path, verbs in paths.items():
        for verb in verbs if not path.startswith(OPEN) else ():
            body = BODIES.get((verb, path))
            found.append((verb, path.format(**names), {} if body is None else {"json": body}))
            if (verb, path) in GENERATING:
                found.append((verb, path, {"json": {**(body or {}), **GENERATING[verb, path]}}))
    found = [(verb, path, sent) for verb, path, sent in found if path not in ("/adapters", "/generate")]
    found.append(("post", "/score?task=a", {"json": BODIES["post", "/score"]}))
    for task in ("a", "base"):
        found.append(("post", f"/generate?task={task}", {"json": {"prompt": "x", "stream": task == "a"}}))
    for body in (zips[1], bytes(2**18)):  # the second is more than the tenant may hold
        found.append(("post", "/adapters?task=b", {"content": body, "headers": {"Content-Type": "application/zip"}}))
    return found


async def delete_soon(site: Site, way: str, patch: pytest.MonkeyPatch) -> None:
    """Have a tenant deleted once a request with `LATE` is identified, its task or version once they are resolved."""

    async def delete_of(tenant: str) -> None:
        headers = ADMIN | ({"X-Tenant": tenant} if "task" in way else {})
        deleting = site.http.delete(way.format(task="a", number=1, tenant=tenant), headers=headers)
        assert (await asyncio.create_task(deleting)).status_code == 204

    async def behind_identify(request: Request) -> None:
        if (tenant := request.headers.get(LATE)) is not None:
            await delete_of(tenant)

    async def late(spec: GenerationSpec) -> ResolvedAdapters:
        resolved = await resolve(spec)
        await delete_of(spec.tenant)
        return resolved

    resolve = site.state.generation.resolver.resolve
    if "task" in way:
        patch.setattr(site.state.generation.resolver, "resolve", late)
    else:
        site.app.dependency_overrides[refuse_unknown_query] = behind_identify  # of every route


@pytest.mark.parametrize("way", WAYS)
async def test_a_request_that_began_before_a_deletion_leaves_nothing(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is deleted while a request is read, the request leaves no series of it and no memory."""
    kind, statuses = {"Content-Type": "application/zip"}, set[int]()
    async with open_site(tiny_base, tmp_path, admin_key=KEY) as site:
        await site.http.post("/adapters?task=a", content=zips[0], headers=ADMIN | kind)  # so the artifact stays
        await delete_soon(site, way, monkeypatch)
        for number, (verb, path, sent) in enumerate(requests_of(site, zips)):
            is_of_task = re.search(r"[/=]a\b", path) is not None or "'a'" in str(sent.get("json"))
            if "task" in way and not (is_of_task and "json" in sent and verb == "post" and "/tasks" not in path):
                continue
            tenant = f"gone{number}"
            theirs, limits = {**ADMIN, "X-Tenant": tenant}, {"max_bytes": 100_000, "requests_per_minute": 100}
            await site.http.post("/tenants", json={"name": tenant, "limits": limits}, headers=ADMIN)
            if is_of_task:
                uploaded = await site.http.post("/adapters?task=a", content=zips[0], headers=theirs | kind)
                assert uploaded.status_code == 201
            headers = {**theirs, LATE: tenant, **sent.get("headers", {})}
            answer = await site.http.request(verb, path, **{**sent, "headers": headers})
            statuses.add(answer.status_code)
        assert statuses == {200} if "task" in way else {200, 404, 429} <= statuses
        left = re.findall(r'^.*tenant="gone.*$', site.state.metrics.render().decode(), re.MULTILINE)
        label = {"{task}": 'task="a"', "{number}": 'version="1"', "{tenant}": ""}[re.findall(r"{\w+}", way)[-1]]
        assert [line for line in left if label in line] == []
        if "tenant" in way:
            site.engine.submitted.clear()  # of the test's engine alone
            assert mentions(site.state, "gone") == []
