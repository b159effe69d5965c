"""Tenants: what one may do, what another never sees, and that every limit says truly when to come again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adapters_store.registry.tenants import TenantLimits
from adapters_store.storage.load_roots import open_roots
from server.core import EngineFailure
from server.errors import VersionGoneError
from tests.server.world import Site, error_of, open_site, until

pytestmark = pytest.mark.anyio
KEY = "the admin's own key"
OPEN = {"/docs", "/health", "/health/live", "/health/ready", "/ping"}
ALL = ["generate", "deploy", "admin"]
REQUEST_ID = {"X-Request-Id": "same"}


@dataclass
class City:
    """A server with an admin key, and ways to ask it as somebody."""

    site: Site

    async def admin(self, verb: str, path: str, body: object = None, tenant: str | None = None) -> httpx2.Response:
        """Ask with the admin key."""
        return await self.ask(KEY, verb, path, body, **({"X-Tenant": tenant} if tenant else {}))

    async def ask(self, key: str | None, verb: str, path: str, body: object = None, **headers: str) -> httpx2.Response:
        """Ask with a key, or with none. Bytes are uploaded."""
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        if isinstance(body, bytes):
            headers["Content-Type"] = "application/zip"
        content = body if isinstance(body, bytes | None) else json.dumps(body)
        return await self.site.http.request(verb, path, content=content, headers=headers)

    async def tenant(self, name: str, scopes: list[str] | None = None, **limits: object) -> str:
        """A new tenant; its key."""
        made = await self.admin("POST", "/tenants", {"name": name, "limits": limits})
        assert made.status_code == 201, made.text
        return await self.key(name, scopes or ALL)

    async def key(self, tenant: str, scopes: list[str]) -> str:
        """A new key of a tenant."""
        made = await self.admin("POST", f"/tenants/{tenant}/keys", {"scopes": scopes})
        assert made.status_code == 201, made.text
        key: str = made.json()["key"]
        return key

    async def generate(self, key: str, **body: object) -> httpx2.Response:
        """POST /generate with the base."""
        return await self.ask(key, "POST", "/generate?task=base", {"prompt": "abcd", "max_tokens": 4, **body})


@asynccontextmanager
async def open_city(base: Path, data: Path, **settings: Any) -> AsyncIterator[City]:
    async with open_site(base, data, admin_key=KEY, **settings) as site:
        yield City(site)


@pytest.fixture
async def city(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> AsyncIterator[City]:
    """A city of the test's own."""
    async with open_city(tiny_base, tmp_path / "city") as made:
        yield made


async def routes(city: City) -> list[tuple[str, str]]:
    """(verb, path) of every route of the document."""
    paths = (await city.admin("GET", "/openapi.json")).json()["paths"]
    return [(verb.upper(), path) for path, verbs in paths.items() for verb in verbs]


async def test_every_route_asks_for_a_key(city: City) -> None:
    """Every route of the document but the open ones is 401 without a key or with a bad, revoked or rotated one."""
    revoked, rotated = await city.tenant("a"), await city.key("a", ALL)
    key_id = revoked.partition(".")[0]
    assert (await city.generate(revoked)).status_code == (await city.generate(rotated)).status_code == 200
    assert (await city.admin("DELETE", f"/tenants/a/keys/{key_id}")).status_code == 204
    again = await city.admin("POST", f"/tenants/a/keys/{rotated.partition('.')[0]}/rotate")
    assert (await city.generate(again.json()["key"])).status_code == 200
    bad = [None, "x", "mh_0123456789ab." + "x" * 43, revoked, rotated, f"{key_id}.", KEY + "x"]
    asked = await routes(city)
    assert len(asked) >= 24
    for verb, path in asked:
        path = path.replace("{number}", "1").replace("{tenant}", "a").replace("{", "").replace("}", "")
        said = {(await city.ask(key, verb, path, **REQUEST_ID)).text for key in bad}
        statuses = {(await city.ask(key, verb, path)).status_code for key in bad}
        assert statuses == ({200} if path in OPEN else {401}), (verb, path, statuses)
        assert len(said) == 1


async def test_a_revocation_from_elsewhere_is_known_within_a_second(city: City) -> None:
    """A key that another process revoked in the registry is none after less than a second."""
    key = await city.tenant("a")
    assert (await city.generate(key)).status_code == 200
    clock = Clock()
    city.site.state.callers._keys.clock = clock
    city.site.state.callers.clear_cache("a")
    assert (await city.generate(key)).status_code == 200
    city.site.state.stores.tenants.revoke_key("a", key.partition(".")[0])
    assert (await city.generate(key)).status_code == 200, "it is remembered for a moment: no look-up per request"
    clock.now += 0.9
    assert (await city.generate(key)).status_code == 401


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.25

    def __call__(self) -> float:
        return self.now


async def test_scopes(city: City, zips: list[bytes]) -> None:
    """Each scope opens its own routes, and 403 names the one that is missing; what is the operator's no key opens."""
    await city.tenant("a")
    keys = {scope: await city.key("a", [scope]) for scope in ALL}
    completion = {"model": "base", "prompt": "x", "max_tokens": 1}
    needs: list[tuple[str, str, str, object]] = [
        ("generate", "POST", "/generate?task=base", {"prompt": "x", "max_tokens": 1}),
        ("generate", "POST", "/v1/completions", completion),
        ("deploy", "POST", "/adapters?task=mine", zips[0]),
        ("deploy", "GET", "/tasks/mine/versions/1/artifact", None),
        ("deploy", "DELETE", "/tasks/mine/versions/1", None),
        ("admin", "GET", "/tenants", None),
        ("admin", "GET", "/tenants/a/keys", None),
        ("admin", "POST", "/tenants/a/keys", {"scopes": ["admin"]}),
        ("admin", "GET", "/usage", None),
        ("admin", "GET", "/audit", None),
    ]
    for scope, verb, path, body in needs:
        for other in ALL:
            if other != scope:
                answer = await city.ask(keys[other], verb, path, body)
                error = error_of(answer)
                assert (answer.status_code, error["code"], error["type"]) == (403, "forbidden", "permission_error"), (
                    path
                )
                assert f"scope {scope}" in error["message"]
        assert (await city.ask(keys[scope], verb, path, body)).status_code < 300, path
    for key in keys.values():
        for path in ("/tasks", "/tasks/base", "/v1/models", "/openapi.json", "/docs"):
            assert (await city.ask(key, "GET", path)).status_code == 200, path
        for verb, path in (
            ("GET", "/metrics"),
            ("POST", "/tenants"),
            ("DELETE", "/tenants/a"),
            ("PUT", "/tenants/a/limits"),
        ):
            assert (await city.ask(key, verb, path)).status_code == 403, path


MATRIX: list[tuple[str, str, object]] = [
    ("POST", "/generate?task=secret", {"prompt": "x"}),
    ("POST", "/generate?task=secret", {"prompt": "x", "version": 1}),
    ("POST", "/generate?task=secret", {"prompt": "x", "stream": True}),
    ("POST", "/generate", {"prompt": "x", "adapters": [{"task": "secret"}]}),
    ("POST", "/score?task=secret", {"prompt": "x", "continuations": ["y"]}),
    ("POST", "/v1/completions", {"model": "secret", "prompt": "x"}),
    ("POST", "/v1/completions", {"model": "base", "prompt": "x", "adapters": [{"task": "secret"}]}),
    ("POST", "/v1/responses", {"model": "secret", "input": "x"}),
    ("POST", "/", {"inputs": "x", "parameters": {"adapter_id": "secret"}}),
    ("POST", "/generate_stream", {"inputs": "x", "parameters": {"adapter_id": "secret"}}),
    ("POST", "/tokenize", {"model": "secret", "prompt": "x"}),
    ("POST", "/detokenize", {"model": "secret", "tokens": [1]}),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "secret", "lora_path": "/secret"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "secret"}),
    ("POST", "/v1/chat/completions", {"model": "secret", "messages": [{"role": "user", "content": "x"}]}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/secret", None),
    ("GET", "/tasks", None),
    ("GET", "/tasks/secret", None),
    ("GET", "/tasks/secret/versions/1/artifact", None),
    ("DELETE", "/tasks/secret/versions/1", None),
    ("DELETE", "/tasks/secret", None),
    ("PUT", "/tasks/secret/route", {"versions": {"1": 1}}),
    ("POST", "/tasks/secret/rollback", None),
    ("PUT", "/tasks/secret/pin", {"pinned": True}),
    ("GET", "/tenants", None),
    ("POST", "/tenants", {"name": "theirs"}),
    ("DELETE", "/tenants/theirs", None),
    ("PUT", "/tenants/theirs/limits", {}),
    ("GET", "/tenants/theirs/keys", None),
    ("POST", "/tenants/theirs/keys", {"scopes": ["generate"]}),
    ("POST", "/tenants/theirs/keys/KEY/rotate", None),
    ("DELETE", "/tenants/theirs/keys/KEY", None),
    ("POST", "/tenants/ours/keys/KEY/rotate", None),
    ("DELETE", "/tenants/ours/keys/KEY", None),
    ("GET", "/usage", None),
    ("GET", "/usage?tenant=theirs", None),
    ("GET", "/audit", None),
    ("GET", "/audit?tenant=theirs", None),
    ("GET", "/metrics", None),
]
SAME_FOR_ALL = {("GET", "/openapi.json"), ("GET", "/version"), ("POST", "/ping"), *(("GET", path) for path in OPEN)}


async def test_what_is_foreign_is_absent(city: City, zips: list[bytes]) -> None:
    """Every route with another tenant's names, versions and ids answers byte for byte as before the other was there.

    So do requests that say X-Tenant, and an upload of the same bytes under the same name.
    """
    ours = await city.tenant("ours")
    key_id = "mh_0123456789ab"

    async def look() -> list[tuple[object, ...]]:
        seen: list[tuple[object, ...]] = []
        for verb, path, body in MATRIX:
            for headers in ({}, {"X-Tenant": "theirs"}):
                answer = await city.ask(ours, verb, path.replace("KEY", key_id), body, **REQUEST_ID, **headers)
                seen.append((verb, path, answer.status_code, sorted(answer.headers.items()), answer.content))
                assert answer.status_code != 405, (verb, path)
        answer = await city.ask(ours, "POST", "/adapters?task=secret", zips[0], **REQUEST_ID)
        said = {**answer.json(), "version": "the next of our own task"}
        seen.append(("upload", answer.status_code, sorted(answer.headers), json.dumps(said)))
        assert (await city.ask(ours, "DELETE", "/tasks/secret")).status_code == 204
        return seen

    await look()  # so that what we did ourselves is there both times
    before = [one for one in await look() if "audit" not in str(one[1])]
    theirs = await city.tenant("theirs")
    assert (await city.ask(theirs, "POST", "/adapters?task=secret", zips[0])).status_code == 201
    assert (await city.ask(theirs, "POST", "/generate?task=secret", {"prompt": "x"})).status_code == 200
    key_id = theirs.partition(".")[0]
    after = [one for one in await look() if "audit" not in str(one[1])]
    for was, now in zip(before, after, strict=True):
        assert was == now or key_id in str(now), (was, now)
        assert str(was).replace("mh_0123456789ab", key_id) == str(now)
    assert (await city.ask(theirs, "POST", "/generate?task=secret", {"prompt": "x"})).status_code == 200
    audited = (await city.ask(ours, "GET", "/audit")).json()["changes"]
    assert audited and {entry["tenant"] for entry in audited} == {"ours"}


async def test_the_matrix_is_whole(city: City) -> None:
    """Every route of the document is in the matrix of names that are foreign, or has none of a tenant's."""
    asked = {(verb, path.partition("?")[0]) for verb, path, _ in MATRIX} | {("POST", "/adapters")}
    for verb, path in await routes(city):
        named = path.replace("{task}", "secret").replace("{name}", "secret").replace("{number}", "1")
        named = named.replace("{tenant}", "theirs").replace("{key_id}", "KEY").replace("{version}", "1")
        assert (verb, named) in asked | SAME_FOR_ALL, (verb, path)


async def test_kv_is_shared_within_a_tenant_alone(city: City) -> None:
    """Each tenant's requests go to the engine under its own name, which keeps its KV apart."""
    for tenant in ("a", "b"):
        await city.generate(await city.tenant(tenant))
    await city.admin("POST", "/generate?task=base", {"prompt": "x"})
    await city.admin("POST", "/generate?task=base", {"prompt": "x"}, tenant="b")
    assert [submit.namespace for submit in city.site.engine.submitted] == ["a", "b", "default", "b"]


async def test_the_admin_acts_for_any_tenant(city: City, zips: list[bytes]) -> None:
    """The admin key acts for the tenant of X-Tenant, without it for `default`; an absent tenant is 404."""
    key = await city.tenant("a")
    assert (await city.admin("POST", "/adapters?task=hat", zips[0], tenant="a")).status_code == 201
    assert (await city.admin("GET", "/tasks/hat")).status_code == 404
    assert (await city.ask(key, "GET", "/tasks/hat")).status_code == 200
    answer = await city.admin("GET", "/tasks", tenant="none")
    assert answer.status_code == 404 and error_of(answer)["param"] == "X-Tenant"


async def test_a_tenant_goes(city: City, zips: list[bytes]) -> None:
    """A deleted tenant's keys are none at once, its adapters leave the disk, its name is not given again."""
    key = await city.tenant("a")
    await city.ask(key, "POST", "/adapters?task=hat", zips[0])
    assert (await city.ask(key, "GET", "/tasks/hat")).status_code == 200
    assert len(city.site.stored()) == 1
    assert (await city.admin("DELETE", "/tenants/a")).status_code == 204
    assert (await city.ask(key, "GET", "/tasks/hat")).status_code == 401
    assert city.site.stored() == set()
    assert (await city.admin("GET", "/tasks", tenant="a")).status_code == 404
    for name, said in (("a", "deleted"), ("default", "exists")):
        answer = await city.admin("POST", "/tenants", {"name": name})
        assert answer.status_code == 409 and said in answer.text
    assert (await city.admin("DELETE", "/tenants/default")).status_code == 409


async def test_requests_a_minute(city: City) -> None:
    """Over the limit it is 429, and after the seconds that Retry-After says, not before, one more is let in."""
    clock = city.site.state.rate_limiter._clock = Clock()
    key, other = await city.tenant("a", requests_per_minute=3), await city.tenant("b", requests_per_minute=3)
    for _ in range(3):
        assert (await city.generate(key)).status_code == 200
        clock.now += 10
    answer = await city.ask(key, "POST", "/tasks/x/rollback")
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["type"]) == (429, "tenant_limit", "rate_limit_error")
    assert error["param"] == "requests_per_minute"
    wait = int(answer.headers["retry-after"])
    assert 29 <= wait <= 31
    clock.now += wait - 1.5
    assert (await city.generate(key)).status_code == 429
    clock.now += 1.5
    assert (await city.generate(key)).status_code == 200
    assert (await city.generate(key)).status_code == 429
    assert (await city.generate(other)).status_code == 200
    assert (await city.admin("GET", "/tenants")).status_code == 200


async def test_tokens_a_minute(city: City) -> None:
    """A request counts as its prompt and the most that it may answer, then as what it took; Retry-After is true."""
    clock = city.site.state.rate_limiter._clock = Clock()
    key = await city.tenant("a", tokens_per_minute=40)
    answer = await city.generate(key, max_tokens=37)
    assert answer.status_code == 400 and "41 tokens; the tenant a has 40 a minute" in answer.text
    used = (await city.generate(key, max_tokens=36)).json()["usage"]
    left = 40 - used["prompt_tokens"] - used["completion_tokens"]
    assert 20 < left < 36
    clock.now += 20
    answer = await city.generate(key, max_tokens=left - 3)
    assert (answer.status_code, error_of(answer)["param"]) == (429, "tokens_per_minute")
    assert (await city.generate(key, max_tokens=left - 4)).status_code == 200
    clock.now += 0.5
    answer = await city.generate(key, max_tokens=36)
    wait = int(answer.headers["retry-after"])
    clock.now += wait - 1.5
    assert (await city.generate(key, max_tokens=36)).status_code == 429
    clock.now += 1.5
    assert (await city.generate(key, max_tokens=36)).status_code == 200


async def test_what_is_routed_anew_is_charged_once(
    city: City, zips: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request whose version went while it waited, or whose engine died before its first token, takes nothing then:
    however often it is tried, it counts once in requests, tokens and usage."""
    key = await city.tenant("a", tokens_per_minute=50, requests_per_minute=4)
    assert (await city.ask(key, "POST", "/adapters?task=hat", zips[0])).status_code == 201
    site, check = city.site, city.site.state.retention._ensure_not_deleted
    gone = [VersionGoneError("it went", "task")] * 3

    async def vanish(*what: Any) -> None:
        if gone:
            raise gone.pop()
        await check(*what)

    monkeypatch.setattr(site.state.retention, "_ensure_not_deleted", vanish)
    body = {"prompt": "ab" * 10, "max_tokens": 5, "ignore_eos": True}
    assert (await city.ask(key, "POST", "/generate?task=hat", body)).status_code == 200 and not gone
    usage = site.state.rate_limiter._usage_of("a")
    assert (usage.tokens._sum, usage.requests._sum) == (25, 2)
    site.engine.failure = EngineFailure("engine_restarting", "send it again")
    assert (await city.ask(key, "POST", "/generate?task=hat", body)).status_code == 503
    assert (usage.tokens._sum, usage.requests._sum) == (25, 3)
    site.engine.failure = None
    assert (await city.ask(key, "POST", "/generate?task=hat", body)).status_code == 200
    (used,) = site.state.stores.registry.usage("a")
    assert (usage.tokens._sum, used.requests, used.prompt_tokens, used.completion_tokens) == (50, 2, 40, 10)


async def test_the_queue_of_a_tenant(city: City) -> None:
    """A tenant has at most `max_queued` answers waiting for a first token; one that has it does not count any more."""
    key = await city.tenant("a", max_queued=2, max_running=1, share=2.0)
    city.site.engine.delay_s = 0.2
    rate_limiter = city.site.state.rate_limiter

    async def hold() -> httpx2.Response:
        return await city.generate(key, n=2, ignore_eos=True, max_tokens=20)

    held = asyncio.create_task(hold())
    await until(lambda: rate_limiter._usage_of("a").num_queued == 2)
    answer = await city.generate(key)
    assert (answer.status_code, error_of(answer)["param"]) == (429, "max_queued")
    assert int(answer.headers["retry-after"]) >= 1
    assert (await city.generate(key, n=3)).status_code == 400
    choice = {"type": "choice", "choices": ["a", "b"]}
    answer = await city.generate(key, response_format=choice, label_probs=True)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "label_probs")
    await until(lambda: rate_limiter._usage_of("a").num_queued == 0)
    city.site.engine.delay_s = 0.0
    assert (await city.generate(key)).status_code == 200
    assert (await held).status_code == 200
    assert rate_limiter._usage_of("a").open == {}
    assert {(one.share, one.max_running) for one in city.site.engine.submitted} == {(2.0, 1)}


async def test_room_for_adapters(city: City, zips: list[bytes]) -> None:
    """An upload over the tenant's adapters or bytes is 429 without Retry-After, nothing of it stays, and room helps."""
    key = await city.tenant("a", max_adapters=1)
    assert (await city.ask(key, "POST", "/adapters?task=one", zips[0])).status_code == 201
    answer = await city.ask(key, "POST", "/adapters?task=two", zips[1])
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (429, "tenant_limit") and "1 adapters" in error["message"]
    assert "retry-after" not in answer.headers
    assert len(city.site.stored()) == 1
    assert (await city.ask(key, "DELETE", "/tasks/one")).status_code == 204
    assert (await city.ask(key, "POST", "/adapters?task=two", zips[1])).status_code == 201
    limits = {"max_bytes": 10}
    assert (await city.admin("PUT", "/tenants/a/limits", limits)).json()["limits"]["max_bytes"] == 10
    assert (await city.ask(key, "POST", "/adapters?task=two", zips[0])).status_code == 429
    (shown,) = (await city.ask(key, "GET", "/tenants")).json()["tenants"]
    assert (shown["num_adapters"], shown["limits"]["max_adapters"]) == (1, None) and shown["bytes"] > 10


async def test_usage(city: City, zips: list[bytes]) -> None:
    """The usage of a whole answer is in the registry before its last byte: a kill right after loses none of it."""
    key = await city.tenant("a")
    await city.ask(key, "POST", "/adapters?task=hat", zips[0])
    body = {"prompt": "abcd", "max_tokens": 3}
    for task, stream in (("hat", False), ("hat", True), ("base", False)):
        answer = await city.ask(key, "POST", f"/generate?task={task}", body | {"stream": stream})
        assert answer.status_code == 200
    found = {(one.task, one.version): one for one in city.site.state.stores.registry.usage("a")}
    assert (found["hat", 1].requests, found["hat", 1].prompt_tokens, found["hat", 1].completion_tokens) == (2, 8, 6)
    await city.generate(await city.tenant("b"))
    mine = (await city.ask(key, "GET", "/usage")).json()["usage"]
    assert {row["tenant"] for row in mine} == {"a"} and len(mine) == 2
    everyone = (await city.admin("GET", "/usage")).json()["usage"]
    assert {row["tenant"] for row in everyone} == {"a", "b"}
    assert (await city.admin("GET", "/usage?tenant=a")).json()["usage"] == mine
    assert (await city.admin("GET", "/usage", tenant="a")).json()["usage"] == mine


async def test_pages(city: City) -> None:
    """Pages of usage and of tenants, one behind another, have everything once; a page's cost is that of its rows."""
    for name in ("b", "a"):
        await city.tenant(name)
    places = [(tenant, task, number) for tenant in ("a", "b", "gone") for task in ("x", "y") for number in (1, 2, 10)]
    registry = city.site.state.stores.registry
    registry.add_usages(dict.fromkeys(places, (1, 2, 3)))
    for path, key, whole in (
        ("/usage", "usage", len(places)),
        ("/tenants", "tenants", 3),
        ("/usage?tenant=a", "usage", 6),
    ):
        everything = (await city.admin("GET", path)).json()
        assert len(everything[key]) == whole and everything["next"] is None
        found, start = list[Any](), f"{path}{'&' if '?' in path else '?'}limit=2"
        page = (await city.admin("GET", start)).json()
        while page["next"] is not None:
            assert len(page[key]) == 2
            found += page[key]
            page = (await city.admin("GET", f"{start}&after={page['next']}")).json()
        found += page[key]
        assert found == everything[key]
    for after in ("a", "a/x", "a/x/one", "a/x/1/2", "A/x/1", ""):
        assert (await city.admin("GET", f"/usage?after={after}")).status_code == 422


async def test_what_still_runs_is_counted_as_it_comes(city: City) -> None:
    """A long answer is counted once a second while it runs, not only when it has ended."""
    city.site.engine.delay_s = 0.02
    body = {"prompt": "ab", "max_tokens": 200, "ignore_eos": True}
    running = asyncio.create_task(city.admin("POST", "/generate?task=base", body))
    registry, usage = city.site.state.stores.registry, city.site.state.usage

    def is_counted() -> bool:
        usage.flush(registry)  # as once a second
        return any(one.completion_tokens for one in registry.usage("default"))

    await until(is_counted, 20)
    (partly,) = registry.usage("default")
    assert (partly.requests, partly.prompt_tokens) == (0, 2) and 0 < partly.completion_tokens < 200
    city.site.engine.delay_s = 0.0
    await running
    (whole,) = registry.usage("default")
    assert (whole.requests, whole.prompt_tokens, whole.completion_tokens) == (1, 2, 200)


CHANGES: dict[tuple[str, str], tuple[str, object]] = {
    ("POST", "/tenants"): ("tenant.create", {"name": "b"}),
    ("PUT", "/tenants/{tenant}/limits"): ("limits.set", {"max_running": 3}),
    ("POST", "/tenants/{tenant}/keys"): ("key.create", {"scopes": ["generate"]}),
    ("POST", "/tenants/{tenant}/keys/{key_id}/rotate"): ("key.rotate", None),
    ("DELETE", "/tenants/{tenant}/keys/{key_id}"): ("key.revoke", None),
    ("POST", "/adapters"): ("version.add", b""),
    ("PUT", "/tasks/{task}/route"): ("route.set", {"versions": {"1": 1}}),
    ("POST", "/tasks/{task}/rollback"): ("route.rollback", None),
    ("PUT", "/tasks/{task}/pin"): ("task.pin", {"pinned": True}),
    ("DELETE", "/tasks/{task}/versions/{number}"): ("version.delete", None),
    ("DELETE", "/tasks/{task}"): ("task.delete", None),
    ("POST", "/v1/load_lora_adapter"): ("version.add", {"lora_name": "l", "lora_path": ""}),
    ("POST", "/v1/unload_lora_adapter"): ("task.delete", {"lora_name": "l"}),
    ("DELETE", "/tenants/{tenant}"): ("tenant.delete", None),
}
NO_CHANGES = {
    "/", "/generate", "/generate_stream", "/score", "/v1/completions", "/v1/chat/completions", "/v1/responses",
    "/tokenize", "/detokenize", "/ping",
}  # fmt: skip


async def test_every_change_is_in_the_log(city: City, zips: list[bytes], loras: list[Path]) -> None:
    """Every route that changes something leaves a line with who, what and in which request; the list here is whole."""
    there = [(verb, path) for verb, path in await routes(city) if verb != "GET" and path not in NO_CHANGES]
    assert set(there) <= set(CHANGES), set(there) - set(CHANGES)
    city.site.state.load_roots.extend(open_roots([str(loras[2].parent)]))
    await city.tenant("a")
    for body in zips[:2]:
        assert (await city.admin("POST", "/adapters?task=t", body, tenant="a")).status_code == 201
    for number, (verb, path) in enumerate(one for one in CHANGES if one in there):
        action, sent = CHANGES[verb, path]
        key_id = (await city.admin("GET", "/tenants/a/keys")).json()["keys"][0]["id"]
        named = (
            path.replace("{tenant}", "a").replace("{key_id}", key_id).replace("{task}", "t").replace("{number}", "1")
        )
        named, sent = ("/adapters?task=t", zips[2]) if path == "/adapters" else (named, sent)
        sent = sent | {"lora_path": str(loras[2])} if isinstance(sent, dict) and "lora_path" in sent else sent
        headers = {"X-Tenant": "a", "X-Request-Id": f"change-{number}"}
        answer = await city.ask(KEY, verb, named, sent, **headers)
        assert answer.status_code < 300, (verb, path, answer.text)
        lines = (await city.admin("GET", "/audit?limit=5")).json()["changes"]
        (line,) = (line for line in lines if line["action"] == action and line["request_id"] == f"change-{number}")
        assert line["actor"] == "admin" and line["tenant"] == ("b" if path == "/tenants" else "a")
    page = (await city.admin("GET", "/audit?limit=2")).json()["changes"]
    further = (await city.admin("GET", f"/audit?limit=2&before={page[-1]['number']}")).json()["changes"]
    assert further[0]["number"] == page[-1]["number"] - 1


async def test_a_change_by_a_key_is_its_own(city: City, zips: list[bytes]) -> None:
    """A change by a tenant's key is in the log under the key's id, which its tenant's admin can read."""
    key = await city.tenant("a")
    await city.ask(key, "POST", "/adapters?task=t", zips[0], **REQUEST_ID)
    changes, actor = (await city.ask(key, "GET", "/audit")).json()["changes"], key.partition(".")[0]
    found = {(one["action"], one["actor"]) for one in changes if one["request_id"] == "same"}
    assert found == {("version.add", actor), ("route.set", actor)}
    assert key.partition(".")[2] not in json.dumps(changes)


@pytest.mark.parametrize(
    "body",
    [
        *({"name": name} for name in ("A", "", "a" * 64)),
        {},
        {"name": "a", "limits": {"max_runing": 1}},
        {"name": "a", "limits": {"share": 0}},
        {"name": "a", "limits": {"max_running": 0}},
        {"name": "a", "limits": {"max_bytes": "1GiB"}},
    ],
)
async def test_what_is_no_tenant(city: City, body: object) -> None:
    """A name or a limit that cannot be is 422 and names the field."""
    answer = await city.admin("POST", "/tenants", body)
    assert answer.status_code == 422 and error_of(answer)["param"]


async def test_what_is_no_key(city: City) -> None:
    """A key without scopes, or with an unknown one, is 422."""
    for scopes in ([], ["root"], ["generate", "x"]):
        assert (await city.admin("POST", "/tenants/default/keys", {"scopes": scopes})).status_code == 422


async def test_tenants_in_metrics_are_bounded(city: City) -> None:
    """Metrics have a tenant's requests, tokens, waits and refusals; of many tenants the last are one series."""
    key = await city.tenant("a", requests_per_minute=1)
    await city.generate(key)
    await city.generate(key)
    text = (await city.admin("GET", "/metrics")).text
    assert 'manyhats_tenant_requests_total{status="200",tenant="a"} 1.0' in text
    assert 'manyhats_tenant_tokens_total{kind="prompt",tenant="a"} 4.0' in text
    assert "manyhats_tenant_refusals_total" in text and "manyhats_tenant_time_to_first_token_seconds_count" in text
    labels = {city.site.state.metrics.tenant_label(f"t{number}") for number in range(500)}
    assert len(labels) == 100 and "_other" in labels


async def test_without_an_admin_key_there_is_one_tenant(site: Site) -> None:
    """A server without an admin key makes no tenants or keys, and may still limit its one tenant."""
    for path, body in (("/tenants", {"name": "a"}), ("/tenants/default/keys", {"scopes": ["generate"]})):
        answer = await site.post(path, body)
        assert answer.status_code == 403 and "MANYHATS_ADMIN_KEY" in answer.text
    answer = await site.http.put("/tenants/default/limits", json={"requests_per_minute": 1})
    assert answer.status_code == 200
    assert [(await site.http.get("/tasks")).status_code for _ in range(2)] == [200, 429]
    assert site.state.stores.tenants.get("default").limits == TenantLimits(requests_per_minute=1)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        *(({"Host": host}, 403) for host in ("evil.example", "evil.example:8000")),
        *(({"Host": host}, 403) for host in ("127.0.0.1.evil.example", "[::1")),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "LOCALHOST"}, 200),
    ],
)
async def test_pages_of_the_web_cannot_ask(site: Site, city: City, headers: dict[str, str], status: int) -> None:
    """A request without a key that names another host, as a page whose name was bound to loopback does, is 403."""
    answer = await site.http.get("/tasks", headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert error_of(answer)["param"] in headers
    assert (await site.http.get("/health/live", headers=headers)).status_code == 200
    assert (await city.ask(KEY, "GET", "/tasks", **headers)).status_code == 200
