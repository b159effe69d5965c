"""A greedy client, at every route: a bounded part of what it sends is taken, others are answered, nothing is left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from server import http_protocol
from server.http_protocol import BoundedProtocol
from server.listen import DrainingServer
from tests.kit.greedy_client import GREED, SENDS_AT_MOST, Taken, Target, be_greedy
from tests.server.api.test_hang import NAMES
from tests.server.api.test_tenants import KEY
from tests.server.documented import fault_of, operation_of
from tests.server.test_listen import serving
from tests.server.world import Site, until

pytestmark = pytest.mark.anyio

BOUNDS: dict[str, Any] = {"max_body_bytes": 2**16, "max_upload_bytes": 2**18, "body_timeout_s": 0.3}
QUERIES = {"/generate": "?task=base", "/adapters": "?task=new"}
AS_ADMIN = f"Authorization: Bearer {KEY}\r\n"


@pytest.fixture(scope="module")
async def served(
    anyio_backend: str, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Site, DrainingServer]]:
    """A server with keys, as the command runs it."""
    async with serving(tiny_base, tmp_path_factory.mktemp("greedy"), admin_key=KEY, **BOUNDS) as made:
        yield made


def hurry(patch: pytest.MonkeyPatch, is_slow: bool) -> None:
    """Have little patience with bytes that nobody wants, and with who is slow or does not read."""
    patch.setattr(http_protocol, "MAX_UNWANTED_BYTES", 2**20)
    patch.setattr(http_protocol, "MAX_SMALL_PARTS", 2**11)
    for name in ("HEADER_TIMEOUT_S", "MAX_UNREAD_S") if is_slow else ():
        patch.setattr(http_protocol, name, 0.3)


def targets_of(site: Site) -> list[Target]:
    """Every route of the OpenAPI document, and one that is not there."""
    paths = site.app.openapi()["paths"]
    kinds = {"/adapters": "application/zip"}
    found = [
        Target(verb, path.format(**NAMES) + QUERIES.get(path, ""), kinds.get(path, "application/json"), AS_ADMIN)
        for path, verbs in paths.items()
        for verb in verbs
    ]
    assert len(found) > 25
    return [*found, Target("post", "/no/such/route", headers=AS_ADMIN)]


def undocumented(target: Target, taken: Taken) -> str | None:
    """What the document does not say of a refusal, whoever gave it: the API, or what reads HTTP before it."""
    if taken.status is None or taken.status < 400:
        return None
    operation = operation_of(target.verb.upper(), target.path.partition("?")[0])
    return fault_of(operation, taken.status, "application/json", json.dumps(taken.refusal).encode())


@asynccontextmanager
async def others_are_answered(site: Site) -> AsyncIterator[None]:
    """While the block runs, `live` is answered, again and again."""
    num_answered, is_over = 0, False

    async def ask() -> None:
        nonlocal num_answered
        while not is_over or not num_answered:
            async with asyncio.timeout(20):
                assert (await site.http.get("/health/live")).status_code == 200
            num_answered += 1
            await asyncio.sleep(0.02)

    asking = asyncio.create_task(ask())
    try:
        yield
    finally:
        is_over = True
        await asking


def is_idle(connection: object) -> bool:
    return isinstance(connection, BoundedProtocol) and connection.is_idle


async def nothing_is_left(site: Site, server: DrainingServer) -> None:
    """Wait until no connection is open but that of `site`, and nothing runs, waits or is staged."""
    state = server.server_state
    await until(lambda: all(is_idle(one) for one in state.connections) and not state.tasks, 20)
    assert not site.engine.stats.num_running and not site.staged()


@pytest.mark.parametrize("name", GREED)
async def test_every_route(served: tuple[Site, DrainingServer], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What has no end is cut off within a bound, in the API's form if the client hears it; what is whole is answered.

    Meanwhile others are answered; memory stays, and no connection, task or file is left.
    """
    (site, server), greed, process = served, GREED[name], psutil.Process()
    hurry(monkeypatch, greed.is_deaf or greed.pause_s > 0)
    targets, before = targets_of(site), process.memory_info().rss
    address = ("127.0.0.1", int(site.http.base_url.port or 0))
    async with others_are_answered(site):
        found = await asyncio.gather(*(be_greedy(greed, target, address) for target in targets))
    for target, taken in zip(targets, found, strict=True):
        what = f"{target.verb} {target.path}: {taken.num_sent} bytes were taken; {taken.answer[:300]!r}"
        assert taken.is_closed or greed.is_whole, what
        assert taken.num_sent < SENDS_AT_MOST, what
        assert taken.status is not None or not greed.is_answered, what
        assert taken.status is None or taken.status < 500, what
        assert (fault := undocumented(target, taken)) is None, f"{what}: {fault}"
    await nothing_is_left(site, server)
    assert process.memory_info().rss - before < 64 * 2**20


async def test_connections_that_say_nothing(
    served: tuple[Site, DrainingServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more connections than there may be, those that waited longest are closed; what runs is answered whole."""
    site, server = served
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", 20)
    monkeypatch.setattr(site.engine, "delay_s", 0.02)
    port = int(site.http.base_url.port or 0)
    asking = [asyncio.create_task(ask(site, number)) for number in range(4)]
    await until(lambda: site.engine.stats.num_running == 4)
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(200)]
    async with asyncio.timeout(20):
        assert await idle[0][0].read() == b""
        assert (await site.http.get("/health/live")).status_code == 200
    assert len(server.server_state.connections) <= 20
    assert await asyncio.gather(*asking) == [200] * 4
    for _, writer in idle:
        writer.close()
    await nothing_is_left(site, server)


async def ask(site: Site, number: int) -> int:
    body = {"prompt": f"{number}" * 40}
    return (
        await site.http.post("/generate?task=base", json=body, headers={"Authorization": f"Bearer {KEY}"})
    ).status_code


async def test_connections_that_are_all_busy(
    served: tuple[Site, DrainingServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more than there may be, while all others are busy, is 503 in the API's form."""
    site, server = served
    monkeypatch.setattr(site.engine, "delay_s", 0.05)
    await nothing_is_left(site, server)
    num_busy = max(4, len(server.server_state.connections))  # those that the client keeps open are used first
    asking = [asyncio.create_task(ask(site, number)) for number in range(num_busy)]
    await until(lambda: site.engine.stats.num_running == num_busy)
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", num_busy)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(site.http.base_url.port or 0))
    taken = Taken(answer=await asyncio.wait_for(reader.read(), 20))
    assert (taken.status, taken.refusal["error"]["code"]) == (503, "overloaded")
    assert [undocumented(target, taken) for target in targets_of(site)] == [None] * len(targets_of(site))
    writer.close()
    assert await asyncio.gather(*asking) == [200] * num_busy
