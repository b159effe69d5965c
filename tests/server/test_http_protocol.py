"""No part of a request grows without bound before it is complete, and what is no request is told in the API's form."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.http_protocol import MAX_HEAD_BYTES, MAX_HEADERS, max_connections
from tests.server.test_listen import serving

pytestmark = pytest.mark.anyio

GET = b"GET /health/live HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /generate?task=base HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
FLOOD = 64 * 2**20  # bytes that are offered
ENDLESS = {
    "a URL": (b"GET /", b"a", (414, "uri_too_long")),
    "a query": (b"GET /health/live?", b"a=b&", (414, "uri_too_long")),
    "a method": (b"", b"A", (400, "bad_request")),
    "a header": (GET + b"X-A: ", b"a", (431, "headers_too_large")),
    "a header's name": (GET, b"a", (431, "headers_too_large")),
    "headers": (GET, b"X-A: b\r\n", (431, "headers_too_large")),
    "a folded header": (GET + b"X-A: b\r\n", b" c\r\n", None),
    "empty lines": (b"", b"\r\n", None),
    "a chunk's extension": (POST + b"1;a=", b"b", None),
    "a chunk's size": (POST, b"0", None),
    "requests": (b"", GET + b"\r\n", None),
    "trailers": (POST + b"0\r\n", b"X-A: b\r\n", None),
    "a trailer": (POST + b"0\r\nX-A: ", b"b", None),
}


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]] | None:
    """The status and the error of an answer; None if the connection was closed without one."""
    try:
        said = await asyncio.wait_for(reader.read(), 20)
    except ConnectionError:
        return None
    if not said:
        return None
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def pieces(part: bytes) -> Iterator[bytes]:
    piece = part * (65536 // len(part))
    return itertools.repeat(piece, FLOOD // len(piece))


@pytest.mark.parametrize(
    ("soft", "expected"),
    [(1024, 512), (2**20, 2**19), (2**20 + 1, 2**19), (2**21, 2**19), (resource.RLIM_INFINITY, 2**19)],
)
def test_connections_of_every_limit(monkeypatch: pytest.MonkeyPatch, soft: int, expected: int) -> None:
    """Half of the open files may be connections, whatever their limit is: none is not what it ever comes to."""
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (soft, soft))
    assert max_connections() == expected


@pytest.mark.parametrize("name", ENDLESS)
async def test_no_part_is_endless(anyio_backend: str, tiny_base: Path, tmp_path: Path, name: str) -> None:
    """What never ends is refused within its bound, in a form or by closing; memory stays, and others are answered."""
    begin, part, refused = ENDLESS[name]
    async with serving(tiny_base, tmp_path) as (site, _):
        process = psutil.Process()
        reader, writer = await asyncio.open_connection("127.0.0.1", site.http.base_url.port)
        before, sent = process.memory_info().rss, 0
        writer.write(begin)
        try:
            for piece in pieces(part):
                writer.write(piece)
                sent += len(piece)
                await asyncio.wait_for(writer.drain(), 10)
                if reader.at_eof() or writer.transport.is_closing():
                    break
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        answer = await read_answer(reader)
        if refused is not None and answer is not None:  # the answer may be lost when what was sent is not read
            assert (answer[0], answer[1]["code"]) == refused
        assert sent < FLOOD, "all of it was taken"
        assert process.memory_info().rss - before < 32 * 2**20
        assert (await site.http.get("/health/live")).status_code == 200
        writer.close()


@pytest.mark.parametrize(
    ("head", "refused"),
    [
        (b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: a\r\n\r\n", (414, "uri_too_long")),
        (GET + b"X-A: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n", (431, "headers_too_large")),
        (GET + b"X-A: b\r\n" * MAX_HEADERS + b"\r\n", (431, "headers_too_large")),
        (b"NO HTTP\r\n\r\n", (400, "bad_request")),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", (400, "bad_request")),
        (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", (400, "bad_request")),
        (b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", (400, "bad_request")),
        (GET + b"Content-Length: x\r\n\r\n", (400, "bad_request")),
        (GET + b"X A: b\r\n\r\n", (400, "bad_request")),
        (POST + b"zz\r\n", (400, "bad_request")),
    ],
)
async def test_what_is_refused_has_the_form(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, head: bytes, refused: tuple[int, str]
) -> None:
    """A head that is too large, and what is no HTTP, get a status, a code and a sentence; the connection is closed."""
    async with serving(tiny_base, tmp_path) as (site, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", site.http.base_url.port)
        writer.write(head)
        answer = await read_answer(reader)
        assert answer is not None
        assert (answer[0], answer[1]["code"]) == refused
        assert set(answer[1]) == {"type", "code", "message", "param", "request_id"}
        writer.close()


async def test_random_bytes_get_the_form(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A request with any byte changed is answered in JSON or closed; never with plain text, and the server lives."""
    draw = random.Random(0)
    request = GET + b"Content-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    async with serving(tiny_base, tmp_path) as (site, _):
        for _ in range(300):
            spoiled = bytearray(request)
            for _ in range(draw.randint(1, 3)):
                spoiled[draw.randrange(len(spoiled))] = draw.randrange(256)
            reader, writer = await asyncio.open_connection("127.0.0.1", site.http.base_url.port)
            writer.write(bytes(spoiled))
            writer.write_eof()
            said = await asyncio.wait_for(reader.read(), 30)
            writer.close()
            if said:
                head, _, body = said.partition(b"\r\n\r\n")
                assert b"content-type: application/json" in head.lower(), (bytes(spoiled), said)
                assert isinstance(json.loads(body), dict)
        assert (await site.http.get("/health/live")).status_code == 200


async def test_a_large_head_within_the_bounds(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """Headers just below the bounds are taken, request after request on one connection."""
    async with serving(tiny_base, tmp_path) as (site, _):
        many = {f"x-{number}": "b" for number in range(MAX_HEADERS - 10)}
        for headers in ({"x-a": "a" * (MAX_HEAD_BYTES - 1000)}, many, {"x-a": "a" * (MAX_HEAD_BYTES - 1000)}):
            assert (await site.http.get("/health/live", headers=headers)).status_code == 200
        answer = await site.post("/generate?task=base", {"prompt": "a" * 200_000})
        assert answer.status_code == 400  # too long a prompt, not too large a head
