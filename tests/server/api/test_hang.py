"""A database or a store that hangs is as one that is dead: what needs it is 503 soon, what does not need it goes on."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import make_url

from adapters_store.registry.postgresql import LimitedConnection
from adapters_store.storage import directory
from server import dependency
from server.dependency import Dependency
from tests.kit.hang import Valve, valve_of_database, valve_of_store
from tests.kit.metrics import Reading
from tests.kit.proxy import Proxy, proxy
from tests.kit.services import postgresql, s3
from tests.server.api.test_tenants import KEY
from tests.server.test_listen import serving
from tests.server.world import Site, error_of, open_site, until

pytestmark = pytest.mark.anyio
ADMIN = {"Authorization": f"Bearer {KEY}"}
LIMIT_S = 0.3
NAMES = {"task": "one", "number": "1", "name": "base", "tenant": "acme", "key_id": "mh_aaaaaaaaaaaa"}
BASE = {"prompt": "x", "max_tokens": 1}
LOAD_ROOT = "/nowhere"
BODIES: dict[tuple[str, str], Any] = {
    ("post", "/generate"): BASE,
    ("post", "/v1/completions"): {"model": "base", **BASE},
    ("post", "/v1/chat/completions"): {
        "model": "base",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1,
    },
    ("post", "/score"): {"prompt": "x", "continuations": ["y"]},
    ("post", "/v1/responses"): {"model": "base", "input": "x", "max_output_tokens": 1},
    ("post", "/"): {"inputs": "x"},
    ("post", "/generate_stream"): {"inputs": "x"},
    ("post", "/tokenize"): {"prompt": "x"},
    ("post", "/detokenize"): {"tokens": [1]},
    ("post", "/v1/load_lora_adapter"): {"lora_name": "loaded", "lora_path": f"{LOAD_ROOT}/a"},
    ("post", "/v1/unload_lora_adapter"): {"lora_name": "absent"},
    ("put", "/tasks/{task}/route"): {"versions": {"1": 1}},
    ("put", "/tasks/{task}/pin"): {"pinned": True},
    ("post", "/tenants"): {"name": "t"},
    ("put", "/tenants/{tenant}/limits"): {},
    ("post", "/tenants/{tenant}/keys"): {"scopes": ["generate"]},
}
NEEDS_NO_REGISTRY = {
    ("post", "/generate"),
    ("post", "/v1/completions"),
    ("post", "/v1/chat/completions"),
    ("post", "/score"),
    ("post", "/v1/responses"),
    ("post", "/"),
    ("post", "/generate_stream"),
    ("get", "/v1/models/{name}"),
    ("post", "/tokenize"),
    ("post", "/detokenize"),
    ("get", "/version"),
    ("get", "/health/live"),
    ("get", "/metrics"),
    ("get", "/openapi.json"),
    ("get", "/docs"),
}
NEEDS_STORE = {
    ("post", "/adapters"),
    ("post", "/v1/load_lora_adapter"),
    ("get", "/tasks/{task}/versions/{number}/artifact"),
}
READY = [("get", "/health/ready"), ("get", "/health"), ("get", "/ping"), ("post", "/ping")]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores are checked often."""
    for name in ("CHECK_EVERY_S", "FIRST_WAIT_S", "MAX_WAIT_S"):
        monkeypatch.setattr(dependency, name, 0.05)


def hurry(site: Site) -> None:
    """From now on nobody waits long for a store."""
    for one in (site.state.stores.database, site.state.stores.storage):
        one.limit_s = LIMIT_S


async def ask_all(site: Site, zips: list[bytes]) -> dict[tuple[str, str], httpx2.Response]:
    """Ask every route of the OpenAPI document, deletions last: the answers by verb and path. None hangs."""
    document = site.app.openapi()["paths"]
    routes = [(verb, path) for path, verbs in document.items() for verb in verbs]
    assert len(routes) > 25
    answers = {}
    for verb, path in sorted(routes, key=lambda route: route[0] == "delete"):
        query = {"/generate": "?task=base", "/score": "?task=base", "/adapters": "?task=new"}.get(path, "")
        headers = {**ADMIN, "Content-Type": "application/zip" if path == "/adapters" else "application/json"}
        if path == "/adapters":
            request = site.http.build_request(verb, path + query, content=zips[1], headers=headers)
        else:
            needs_body = "requestBody" in document[path][verb]
            body = BODIES[verb, path] if needs_body else None
            request = site.http.build_request(verb, path.format(**NAMES) + query, json=body, headers=headers)
        async with asyncio.timeout(20):
            answers[verb, path] = await site.http.send(request)
    return answers


def check_registry_away(answers: dict[tuple[str, str], httpx2.Response]) -> None:
    """What needs no registry is 200, all else 503 with its code and when to come again; `ready` says so."""
    ready, *_ = [answers.pop(route) for route in READY]
    assert ready.status_code == 503 and "registry" in ready.json()["reason"]
    fine = {route for route, answer in answers.items() if answer.status_code == 200}
    assert fine == NEEDS_NO_REGISTRY
    for route in answers.keys() - fine:
        answer = answers[route]
        assert (answer.status_code, error_of(answer)["code"]) == (503, "registry_unavailable"), (route, answer.text)
        assert int(answer.headers["retry-after"]) > 0 and "registry" in error_of(answer)["message"]


def check_store_away(answers: dict[tuple[str, str], httpx2.Response]) -> None:
    """What moves artifacts is 503 with the store's code, all else is answered; `ready` says so."""
    ready, *_ = [answers.pop(route) for route in READY]
    assert ready.status_code == 503 and "store" in ready.json()["reason"]
    late = {route for route, answer in answers.items() if answer.status_code == 503}
    assert late == NEEDS_STORE
    for route in late:
        assert error_of(answers[route])["code"] == "store_unavailable"


async def recovers(site: Site) -> None:
    """Wait until the server is ready again, and a new upload is taken and served."""
    async with asyncio.timeout(20):
        while (await site.http.get("/health/ready")).status_code != 200:
            await asyncio.sleep(0.02)


@asynccontextmanager
async def city(base: Path, data: Path, zips: list[bytes], **settings: Any) -> AsyncIterator[Site]:
    """A server with keys, the tenant `acme`, and the default tenant's task `one`."""
    async with open_site(base, data, admin_key=KEY, allow_load_from=LOAD_ROOT, **settings) as site:
        headers = {**ADMIN, "Content-Type": "application/zip"}
        taken = await site.http.post("/adapters?task=one", content=zips[0], headers=headers)
        assert taken.status_code == 201, taken.text
        assert (await site.http.post("/tenants", json={"name": "acme"}, headers=ADMIN)).status_code == 201
        yield site


async def when_hung(site: Site, which: Dependency, fault: Proxy | Valve, zips: list[bytes]) -> Any:
    """The answers of all routes while a service hangs, from its first call on; then it goes on, and all is well."""
    if isinstance(fault, Valve):
        fault.close()
    else:
        fault.down.is_hung = True
    try:
        await until(lambda: which.failure, 20)  # told by its own check: nobody asked
        return await ask_all(site, zips)
    finally:
        if isinstance(fault, Valve):
            fault.open()
        else:
            fault.down.is_hung = False
        await recovers(site)


async def test_a_registry_that_hangs(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], soon: None
) -> None:
    """Every route, while no transaction of the database ends: see `check_registry_away`; then all go on."""
    async with city(tiny_base, tmp_path, zips) as site:
        hurry(site)
        stores = site.state.stores
        check_registry_away(await when_hung(site, stores.database, valve_of_database(stores), zips))
        answers = await ask_all(site, zips)
        assert all(answer.status_code < 500 for answer in answers.values())
        samples = Reading.of(answers["get", "/metrics"].text)
        assert samples.value("manyhats_dependency_failures_total", dependency="registry", kind="refused") > 10
        assert samples.value("manyhats_dependency_up", dependency="registry") == 1


async def test_a_store_that_hangs(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every route, while no call of the store ends: see `check_store_away`."""
    valve = valve_of_store(monkeypatch)
    async with city(tiny_base, tmp_path, zips) as site:
        hurry(site)
        check_store_away(await when_hung(site, site.state.stores.storage, valve, zips))


async def test_a_postgresql_that_hangs(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every route, while the connections to PostgreSQL are there and nothing comes: see `check_registry_away`."""
    with postgresql() as url:
        at = make_url(url)
        async with proxy(str(at.host), int(at.port or 0)) as between:
            through = at.set(port=int(between.url.rpartition(":")[2])).render_as_string(hide_password=False)
            async with city(tiny_base, tmp_path, zips, registry=through) as site:
                monkeypatch.setattr(LimitedConnection, "limit_s", LIMIT_S)
                check_registry_away(await when_hung(site, site.state.stores.database, between, zips))


async def test_a_bucket_that_hangs(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every route, while the connections to the bucket are there and nothing comes: see `check_store_away`."""
    with s3(tmp_path, "hats") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        async with proxy("127.0.0.1", int(environment["AWS_ENDPOINT_URL"].rpartition(":")[2])) as between:
            monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
            async with city(tiny_base, tmp_path / "data", zips, store="s3://hats/x") as site:
                monkeypatch.setattr(directory, "CALL_WITHIN_S", LIMIT_S)
                check_store_away(await when_hung(site, site.state.stores.storage, between, zips))


async def test_the_first_who_meet_it(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything was late, too, the base is answered, and a task is 503: nobody waits longer than the limit."""
    monkeypatch.setattr(dependency, "CHECK_EVERY_S", 3600)
    async with city(tiny_base, tmp_path, zips) as site:
        hurry(site)
        valve = valve_of_database(site.state.stores)
        valve.close()
        try:
            async with asyncio.timeout(20):
                asked = [site.http.post(f"/generate?task={task}", json=BASE, headers=ADMIN) for task in ("base", "one")]
                statuses = [answer.status_code for answer in await asyncio.gather(*asked)]
            assert statuses == [200, 503]
        finally:
            valve.open()


async def test_a_stop_while_the_registry_hangs(anyio_backend: str, tiny_base: Path, tmp_path: Path, soon: None) -> None:
    """A signal ends the server within its drain, though calls of the database hang for ever."""
    async with serving(tiny_base, tmp_path, drain_s=0) as (site, server):
        hurry(site)
        valve = valve_of_database(site.state.stores)
        valve.close()
        waiting = asyncio.create_task(site.http.get("/tasks"))
        await until(lambda: site.state.stores.database.failure)
        server.handle_exit(signal.SIGTERM, None)
        assert (await waiting).status_code == 503
    valve.open()
