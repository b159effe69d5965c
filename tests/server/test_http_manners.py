"""What clients and proxies expect of any HTTP server: HEAD, old versions, offered upgrades, packed bodies, origins."""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
import socket
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server import http_protocol
from server.settings import Settings
from tests.server.test_listen import serving
from tests.server.world import Site, error_of, open_site, until

pytestmark = pytest.mark.anyio

BODY = json.dumps({"prompt": "abc", "max_tokens": 3}).encode()
STREAM = json.dumps({"prompt": "abc", "max_tokens": 3, "stream": True}).encode()
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
PAGE = "https://page.example"


@pytest.fixture(scope="module")
async def site(anyio_backend: str, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """A server as the command runs it."""
    async with serving(tiny_base, tmp_path_factory.mktemp("manners")) as (site, _):
        yield site


async def said_to(site: Site, *parts: bytes) -> bytes:
    """All that the server says to bytes that come in parts, until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", site.http.base_url.port)
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0.005)  # or the parts come as one
    said = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return said


def head_of(version: str, body: bytes, headers: bytes = b"Connection: close\r\n") -> bytes:
    start = f"POST /generate?task=base HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return start.encode() + headers + b"\r\n"


async def test_head_is_get_without_a_body(site: Site) -> None:
    """HEAD on every route that has GET is answered as GET is, with its status and headers and no body."""
    paths = (await site.http.get("/openapi.json")).json()["paths"]
    for path in [path.replace("{number}", "1") for path, verbs in paths.items() if "get" in verbs]:
        asked, told = await site.http.get(path), await site.http.head(path)
        assert (told.status_code, told.content) == (asked.status_code, b""), path
        assert told.headers["content-type"] == asked.headers["content-type"]
    assert (await site.http.head("/generate")).status_code == 405


async def test_a_last_slash_is_no_matter(site: Site) -> None:
    """A path with a slash at its end is the same route, without a redirect that would lose a body."""
    assert (await site.http.get("/tasks/")).status_code == 200
    assert (await site.post("/generate/?task=base", BODY)).status_code == 200
    assert (await site.http.get("/health/")).json()["status"] == "ready"


async def test_health_is_ready(site: Site) -> None:
    """GET /health is GET /health/ready, as others name it: 503 while the engine does not answer."""
    assert (await site.http.get("/health")).json() == (await site.http.get("/health/ready")).json()
    site.engine.die()
    try:
        assert (await site.http.get("/health")).status_code == 503
    finally:
        site.engine.revive()


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_http_1_0(site: Site, body: bytes) -> None:
    """A client of HTTP/1.0 gets an answer without chunks, whole or as a stream, and the end of the connection."""
    head, _, answer = (await said_to(site, head_of("1.0", body, b""), body)).partition(b"\r\n\r\n")
    assert b" 200 " in head and b"chunked" not in head.lower()
    if body is STREAM:
        assert answer.startswith(b"data: {") and answer.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(answer)["choices"][0]["text"] == "abc"


@pytest.mark.parametrize(
    "offer", [H2C, b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Connection: Upgrade\r\nUpgrade: x\r\n"]
)
async def test_an_offered_upgrade_loses_nothing(site: Site, offer: bytes) -> None:
    """A request that offers an upgrade is answered as it is, however its bytes are cut; so is the one after it."""
    chunked = (
        b"POST /generate?task=base HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n" + offer + b"\r\n"
    )
    chunks = b"5\r\n" + BODY[:5] + b"\r\n%x\r\n" % (len(BODY) - 5) + BODY[5:] + b"\r\n0\r\n\r\n"
    last = head_of("1.1", BODY) + BODY
    for head, body in ((head_of("1.1", BODY, offer), BODY), (chunked, chunks)):
        whole = head + body
        for parts in ([whole + last], [head, body, last], [head[:40], head[40:] + body[:3], body[3:] + last]):
            said = await said_to(site, *parts)
            assert said.count(b"HTTP/1.1 200") == 2 and said.count(b'"text": "abc"'.replace(b" ", b"")) == 2, said
    empty = await said_to(site, b"GET /tasks HTTP/1.1\r\nHost: localhost\r\n" + offer + b"\r\n" + last)
    assert empty.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("size", [3, 300_000])
async def test_a_packed_body(site: Site, zips: list[bytes], size: int) -> None:
    """A body as gzip is what it unpacks to, on every route that reads one, however large."""
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/zip"}
    body = json.dumps({"prompt": "abc", "max_tokens": 3, "user": "x" * 3}).encode() + b" " * size
    answer = await site.http.post("/generate?task=base", content=gzip.compress(body), headers=headers)
    assert answer.json()["choices"][0]["text"] == "abc"
    answer = await site.http.post(f"/adapters?task=packed{size}", content=gzip.compress(zips[0]), headers=headers)
    assert answer.status_code == 201, answer.text


@pytest.mark.parametrize(
    ("codings", "param"),
    [
        ([("Content-Encoding", "gzip"), ("Content-Encoding", "gzip")], "Content-Encoding"),
        ([("Content-Encoding", "identity, gzip")], "Content-Encoding"),
    ],
)
async def test_several_encodings(site: Site, codings: list[tuple[str, str]], param: str) -> None:
    """A body that is encoded more than once, or on its way, is 415 that names the header, and is not read as JSON."""
    answer = await site.http.post("/generate?task=base", content=gzip.compress(b"{}"), headers=codings)
    assert (answer.status_code, error_of(answer)["param"]) == (415, param)
    head = b"POST /generate?task=base HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    said = await said_to(site, head + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n")
    assert b"415" in said.splitlines()[0] and b"Transfer-Encoding" in said


async def test_refusals_say_what_to_do(site: Site) -> None:
    """What a newcomer gets wrong is answered with what is right: a verb, a path, an empty body, a field's name."""
    for verb, path, body, says in (
        ("GET", "/generate?task=base", "", "takes POST"),
        ("GET", "/", "", "/docs"),
        ("GET", "/nowhere", "", "/docs"),
        ("POST", "/generate?task=base", "", "send a JSON object"),
        ("POST", "/v1/completions", '{"model": "base", "prompt": "x", "max_token": 1}', "did you mean max_tokens?"),
        ("POST", "/generate?task=base", '{"promt": "x"}', "did you mean prompt?"),
        ("POST", "/generate?task=base", '{"prompt": "x", "zzzzzz": 1}', "unknown field zzzzzz"),
    ):
        message = error_of(await site.http.request(verb, path, content=body))["message"]
        assert says in message, (verb, path, message)
    assert (
        await site.http.post("/generate?task=base", content=b"{}", headers={"Content-Encoding": ""})
    ).status_code == 400


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("br", BODY, 415),
        ("deflate", zlib.compress(BODY), 415),
        ("gzip, gzip", BODY, 415),
        ("gzip", BODY, 400),
        ("gzip", gzip.compress(BODY, mtime=0)[:-9], 400),
        ("gzip", gzip.compress(BODY, mtime=0) + b"x", 400),
        ("gzip", gzip.compress(b"[" + b" " * 2**26 + b"]", mtime=0), 413),
    ],
)
async def test_a_body_that_cannot_be_unpacked(site: Site, encoding: str, body: bytes, status: int) -> None:
    """Another encoding is 415 and named, gzip that is none or not whole 400, and one that unpacks to too much 413."""
    headers = {"Content-Encoding": encoding}
    answer = await site.http.post("/generate?task=base", content=body, headers=headers)
    error = error_of(answer)
    assert answer.status_code == status
    assert status != 415 or (encoding in error["message"] and error["param"] == "Content-Encoding")


async def test_a_draining_server_closes(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """Answers while the server drains say that the connection is closed; before that they do not."""
    async with serving(tiny_base, tmp_path, drain_s=30) as (site, server):
        assert "connection" not in (await site.http.get("/health/live")).headers
        site.engine.delay_s = 0.02
        running = asyncio.create_task(site.post("/generate?task=base", {"prompt": "a" * 40}))
        await until(lambda: site.engine.stats.num_running == 1)
        server.handle_exit(signal.SIGTERM, None)
        for path in ("/health/live", "/metrics", "/none"):
            assert (await site.http.get(path)).headers["connection"] == "close"
        assert (await running).headers["connection"] == "close"


async def test_keep_alive_is_a_setting(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """Connections are kept for 120 s between requests, or for what the setting says."""
    async with serving(tiny_base, tmp_path) as (_, server):
        assert server.config.timeout_keep_alive == 120
    async with serving(tiny_base, tmp_path, keep_alive_s=7) as (_, server):
        assert server.config.timeout_keep_alive == 7


async def test_pages_of_other_origins(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A page of an allowed origin may ask, and read the answer, errors too; one of another origin is refused."""
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    async with open_site(tiny_base, tmp_path, allowed_origins=f"{PAGE},https://b.example") as site:
        allowed = await site.http.options("/generate", headers={"Origin": PAGE, **asks})
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, PAGE)
        for path, status in (("/tasks", 200), ("/none", 404), ("/tasks/none", 404)):
            answer = await site.http.get(path, headers={"Origin": PAGE})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)
        refused = await site.http.options("/generate", headers={"Origin": "https://evil.example", **asks})
        assert refused.status_code == 403 and "evil" in error_of(refused)["message"]
        assert "access-control-allow-origin" not in refused.headers
        assert (await site.http.get("/tasks", headers={"Origin": "https://evil.example"})).status_code == 403
    async with open_site(tiny_base, tmp_path) as site:
        refused = await site.http.options("/generate", headers={"Origin": PAGE, **asks})
        assert refused.status_code == 405 and "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("wrong", ["a.example", "https://a.example/", "https://a.example,", "*", "null"])
def test_what_is_no_origin(tiny_base: Path, wrong: str) -> None:
    """A setting that names no origin is refused at start, for no page would match it."""
    with pytest.raises(ValueError, match="is no origin"):
        Settings(allowed_origins=wrong)


async def test_a_client_that_leaves_behind_a_full_buffer(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A client that leaves is noticed though requests that nobody has read stand between, and its request ends."""
    async with serving(tiny_base, tmp_path) as (site, _):
        site.engine.delay_s = 0.05
        for last in (head_of("1.1", BODY, b"") + BODY, head_of("1.1", b"x" * 2**19, b"") + b"x" * 2**19):
            _, writer = await asyncio.open_connection("127.0.0.1", site.http.base_url.port)
            body = json.dumps({"prompt": "a" * 200, "max_tokens": 150}).encode()
            writer.write(head_of("1.1", body, b"") + body)
            await until(lambda: site.engine.stats.num_running == 1)
            for _ in range(3):
                writer.write(last)
            await asyncio.sleep(0.02)
            writer.transport.abort() if last.endswith(b"x") else writer.close()
            await until(lambda: site.engine.stats.num_running == 0, 2)
            assert site.engine.aborted


async def test_a_client_that_does_not_read(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that asks and asks and reads nothing is cut off, and what waits for it meanwhile is bounded."""
    monkeypatch.setattr(http_protocol, "MAX_UNREAD_S", 0.2)
    async with serving(tiny_base, tmp_path) as (_, server):
        (listener,) = [listener for each in server.servers for listener in each.sockets]
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # or the kernel holds all of it
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 12)
        await until(lambda: server.server_state.connections)
        (connection,) = server.server_state.connections
        held = 0
        while server.server_state.connections:
            held = max(held, connection.transport.get_write_buffer_size())
            await asyncio.sleep(0.005)
        assert 2**15 < held < 2**18, held
        client.close()
