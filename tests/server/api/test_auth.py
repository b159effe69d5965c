"""Authentication: with an admin key, every route but health and the page of the document asks for it first."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.server.world import Site, error_of, open_site

pytestmark = pytest.mark.anyio
KEY = "k" * 15 + "é"
OPEN = {"/docs", "/health", "/health/live", "/health/ready", "/ping"}
BEARER = {b"Authorization": f"Bearer {KEY}".encode()}


@pytest.fixture(scope="module")
async def locked(anyio_backend: str, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """A server with an admin key."""
    async with open_site(tiny_base, tmp_path_factory.mktemp("locked"), admin_key=KEY) as site:
        yield site


async def test_every_route_asks_for_the_key(locked: Site) -> None:
    """Every route of the OpenAPI document is 401 without a key and with a bad one, but health and the page that asks
    for a key itself.

    So is the document. Nothing else is told: not whether the task is there, the query sound or the body JSON.
    """
    document = (await locked.http.get("/openapi.json", headers=BEARER)).json()
    routes = [(verb, path) for path, verbs in document["paths"].items() for verb in verbs]
    assert len(routes) >= 14 and {path for _, path in routes} >= OPEN
    bad: list[dict[bytes, bytes]] = [
        {},
        {b"Authorization": b"Bearer wrong"},
        {b"Authorization": f"Basic {KEY}".encode()},
        {b"Authorization": b"Bearer"},
    ]
    for verb, path in routes:
        for headers in bad:
            path = path.replace("{number}", "x").replace("{task}", "a").replace("{name}", "a")
            answer = await locked.http.request(verb, path, headers=headers)
            if path in OPEN:
                assert answer.status_code == 200
                continue
            assert answer.status_code == 401, (verb, path)
            error = error_of(answer)
            assert (error["code"], error["type"]) == ("unauthorized", "authentication_error")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert KEY not in answer.text


async def test_the_key_opens(locked: Site) -> None:
    """The right key opens, in any case of `Bearer`."""
    for scheme in ("Bearer", "bearer", "BEARER"):
        answer = await locked.http.get("/tasks", headers={b"Authorization": f"{scheme} {KEY}".encode()})
        assert answer.status_code == 200


async def test_tenants(locked: Site) -> None:
    """X-Tenant: the default tenant is there, any other is 404; without a key it is 401 first."""
    for name, status in (("default", 200), ("other", 404), ("", 404), ("x" * 5000, 404)):
        answer = await locked.http.get("/tasks", headers={**BEARER, b"X-Tenant": name.encode()})
        assert answer.status_code == status
        if status == 404:
            assert error_of(answer)["param"] == "X-Tenant" and len(answer.text) < 400
    assert (await locked.http.get("/tasks", headers={"X-Tenant": "other"})).status_code == 401


async def test_without_a_key_no_key_is_asked_for(shared: Site) -> None:
    """A server without an admin key needs no key, and serves a request that sends one as well."""
    assert (await shared.http.get("/tasks")).status_code == 200
    assert (await shared.http.get("/tasks", headers={"Authorization": "Bearer x"})).status_code == 200
    assert (await shared.http.get("/tasks", headers={"X-Tenant": "other"})).status_code == 404
