"""Listening and leaving: nothing is accepted too early, slow headers end, and a stop lets what runs finish."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from server import http_protocol, listen
from server.app import create_app
from server.engine.fake import FakeEngineClient
from server.engine.process_client import ProcessEngineClient
from tests.server.engine.world import config
from tests.server.world import Site, ready_of, sent, settings_of, until

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def serving(base: Path, data: Path, **settings: Any) -> AsyncIterator[tuple[Site, listen.DrainingServer]]:
    """A server as the command runs it, in this loop; stopped by a signal at the end."""
    engine = FakeEngineClient(ready_of(base))
    made = settings_of(base, data, **settings)
    app = create_app(made, base, engine)
    (listener,) = listen.bind("127.0.0.1", 0)
    server = listen.DrainingServer(app, made)
    running = asyncio.create_task(server._serve([listener]))
    await until(lambda: server.started)
    try:
        async with httpx2.AsyncClient(base_url=listen.address_of("127.0.0.1", [listener]), timeout=30) as http:
            yield Site(app, engine, data, http), server
    finally:
        if server._drained_by is None:  # a second signal would leave the application open
            server.handle_exit(signal.SIGTERM, None)
        await asyncio.wait_for(running, 10)


async def test_no_answer_waits_for_an_acknowledgement(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """Whatever the event loop, connections send small answers at once."""
    async with serving(tiny_base, tmp_path) as (site, server):
        await site.http.get("/health/live")
        (connection,) = server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_stop_lets_what_runs_finish(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """After the first signal running requests, plain and stream, are answered whole; new work is 503 with a code.

    `ready` is 503, `live` and metrics are 200, and the server ends as soon as nothing runs.
    """
    async with serving(tiny_base, tmp_path, drain_s=30) as (site, server):
        site.engine.delay_s = 0.02
        plain = asyncio.create_task(site.post("/generate?task=base", {"prompt": "a" * 40}))
        stream = asyncio.create_task(site.post("/generate?task=base", {"prompt": "b" * 40, "stream": True}))
        await until(lambda: site.engine.stats.num_running == 2)
        server.handle_exit(signal.SIGTERM, None)
        refused = await site.post("/generate?task=base", {"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"]
        statuses = [(await site.http.get(path)).status_code for path in ("/health/ready", "/health/live", "/metrics")]
        assert statuses == [503, 200, 200]
        assert (await plain).json()["choices"][0]["text"] == "a" * 40
        *events, done = sent((await stream).text)
        assert "".join(json.loads(data)["text"] for _, data in events) == "b" * 40
        assert done == ("message", "[DONE]")
        await until(lambda: server.should_exit, 1)
        assert not site.engine.aborted


async def test_what_outlasts_the_drain_gets_an_error(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A request that outlasts the drain gets 503, or in a stream an event `error`: no cut connection."""
    async with serving(tiny_base, tmp_path, drain_s=0) as (site, server):
        site.engine.delay_s = 0.1
        plain = asyncio.create_task(site.post("/generate?task=base", {"prompt": "a" * 100}))
        stream = asyncio.create_task(site.post("/generate?task=base", {"prompt": "b" * 100, "stream": True}))
        await until(lambda: site.engine.stats.num_running == 2)
        await asyncio.sleep(0.15)  # the stream has begun
        server.handle_exit(signal.SIGTERM, None)
        answer = await plain
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_restarting")
        kind, data = sent((await stream).text)[-1]
        assert (kind, json.loads(data)["error"]["code"]) == ("error", "engine_restarting")


@pytest.mark.parametrize("is_begun", [False, True], ids=["before the engine starts", "while it starts"])
async def test_a_signal_while_the_base_loads_ends_at_once(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, is_begun: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A signal that comes before the server is ready ends it and its engine: no one waits for the base to be loaded.

    The log says so in one line.
    """
    caplog.set_level(logging.INFO)
    made = settings_of(tiny_base, tmp_path)
    command = (sys.executable, "-m", "tests.server.engine.fake_process")
    engine = ProcessEngineClient(config("loads"), command=command)
    (listener,) = listen.bind("127.0.0.1", 0)
    server = listen.DrainingServer(create_app(made, tiny_base, engine), made)

    async def serve() -> None:
        with listener, pytest.raises(SystemExit):
            await server._serve([listener])

    others = psutil.Process().children()
    serving = asyncio.create_task(serve())
    if is_begun:
        await until(lambda: psutil.Process().children() != others)
    began = time.monotonic()
    server.handle_exit(signal.SIGTERM, None)
    await serving
    assert server.is_start_given_up
    told = [record for record in caplog.records if record.name == "server.listen" or record.levelno > logging.INFO]
    assert [(record.getMessage(), record.exc_info) for record in told] == [("the start is given up at a signal", None)]
    assert time.monotonic() - began < 10
    assert psutil.Process().children() == others


async def test_a_second_signal_ends_at_once(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A second signal ends the server without waiting for running requests."""
    async with serving(tiny_base, tmp_path, drain_s=60) as (site, server):
        site.engine.delay_s = 60
        asking = asyncio.create_task(site.post("/generate?task=base", {"prompt": "a"}))
        await until(lambda: site.engine.stats.num_running)
        began = time.monotonic()
        for _ in range(2):
            server.handle_exit(signal.SIGINT, None)
        await until(lambda: not server.server_state.connections or server.should_exit, 3)
        assert server.force_exit
        asking.cancel()
    assert time.monotonic() - began < 5


async def test_headers_that_do_not_come(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that says nothing, or stops within its headers, is closed; one that waits for its answer is not."""
    monkeypatch.setattr(http_protocol, "HEADER_TIMEOUT_S", 0.2)
    async with serving(tiny_base, tmp_path) as (site, _):
        port = site.http.base_url.port
        for begun in (b"", b"\r\n", b"GET /health/live HTTP/1.1\r\nHost:"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(begun)
            assert await asyncio.wait_for(reader.read(), 2) == b"", begun
            writer.close()
        site.engine.delay_s = 0.05
        for _ in range(2):  # the second on the same connection
            assert (await site.ask(prompt="a" * 10))["choices"][0]["text"] == "a" * 10


async def test_a_second_request_whose_headers_do_not_come(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The headers of a later request on a connection have no more time than the first's."""
    monkeypatch.setattr(http_protocol, "HEADER_TIMEOUT_S", 0.2)
    async with serving(tiny_base, tmp_path) as (site, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", site.http.base_url.port)
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"200" in await reader.readuntil(b"}")
        writer.write(b"GET /health/live HT")
        assert await asyncio.wait_for(reader.read(), 2) == b""
        writer.close()


def test_bound_is_not_listening() -> None:
    """Until the server listens, a connection is refused at once, not kept waiting; a port that is taken says so."""
    (listener,) = listen.bind("127.0.0.1", 0)
    with listener:
        address = listener.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=1)
        listener.listen()
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {address[1]}"):
            listen.bind("127.0.0.1", address[1])
    with pytest.raises(OSError, match=r"cannot listen on no\.such\.host\.invalid"):
        listen.bind("no.such.host.invalid", 0)


def test_every_address_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with several addresses is bound on all that the machine has, on one port."""
    names = ["127.0.0.1", "127.0.0.2", "127.0.0.1", "192.0.2.1"]  # the last is nobody's
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (name, 0)) for name in names]
    monkeypatch.setattr(listen, "_addresses", lambda _host, _port: found)
    bound = listen.bind("localhost", 0)
    try:
        assert [listener.getsockname()[0] for listener in bound] == ["127.0.0.1", "127.0.0.2"]
        assert len({listener.getsockname()[1] for listener in bound}) == 1
    finally:
        for listener in bound:
            listener.close()


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("::", "[::1]"), ("localhost",) * 2],  # noqa: S104
)
def test_address(host: str, address: str) -> None:
    """The URL that is printed reaches the server from this machine, for any address that it is bound to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        assert listen.address_of(host, [listener]) == f"http://{address}:{listener.getsockname()[1]}"
