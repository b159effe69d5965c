"""A client that takes all it can: what it sends never ends, or comes slowly, or unpacks to more, or it never reads.

`Greed` is one way to do so, `GREED` are all of them, over any route; `be_greedy` does one to a server that listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

SENDS_AT_MOST = 24 * 2**20  # what a server takes that has no bound
PIECE = 2**16
WITHIN_S = 30.0


@dataclass(frozen=True)
class Target:
    """A route to be greedy at: its verb, its path with its query, and the type of its bodies."""

    verb: str
    path: str
    content_type: str = "application/json"
    headers: str = ""  # more of them, each with its line's end

    def head(self, *headers: str) -> bytes:
        """The request's first line and some headers; more may follow."""
        lines = (f"{self.verb.upper()} {self.path} HTTP/1.1", "Host: localhost", *headers)
        return "".join(f"{line}\r\n" for line in lines).encode() + self.headers.encode()

    def body_head(self, *headers: str, content_type: str | None = None) -> bytes:
        """The whole head of a request with a body."""
        return self.head(f"Content-Type: {content_type or self.content_type}", *headers) + b"\r\n"


@dataclass(frozen=True)
class Greed:
    """What is sent once, and then for ever, or until `whole` bodies are; a client that `is_deaf` never reads.

    After every piece it waits for `pause_s`.
    """

    begin: Callable[[Target], bytes]
    part: Callable[[Target], bytes]
    is_deaf: bool = False
    pause_s: float = 0.0
    is_whole: bool = False  # the part is sent once
    is_answered: bool = True  # HTTP permits to

    def pieces(self, target: Target) -> Iterator[bytes]:
        """What is sent, piece by piece."""
        part = self.part(target)
        if self.is_whole:
            return iter([self.begin(target), part])
        piece = part if self.pause_s else part * max(1, PIECE // len(part))
        return itertools.chain([self.begin(target)], itertools.repeat(piece))


@dataclass
class Taken:
    """How many bytes a client could send, what came back, and whether the server closed the connection."""

    num_sent: int = 0
    answer: bytes = b""
    is_closed: bool = False

    @property
    def status(self) -> int | None:
        """The status of the first answer; None if there was none."""
        return int(self.answer.split(b" ", 2)[1]) if self.answer else None

    @property
    def refusal(self) -> dict[str, Any]:
        """The first answer, which must be one in JSON."""
        head, _, rest = self.answer.partition(b"\r\n\r\n")
        lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        answer: dict[str, Any] = json.loads(rest[: int(lengths[0])])
        return answer


async def be_greedy(greed: Greed, target: Target, address: tuple[str, int]) -> Taken:
    """Be greedy until the server closes, an answer to a whole body came, or `SENDS_AT_MOST` were taken."""
    loop, taken = asyncio.get_running_loop(), Taken()
    with socket.socket() as connection:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PIECE)
        await loop.sock_connect(connection, address)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sending = asyncio.create_task(_send(greed, target, connection, taken))
        if greed.is_deaf:
            await asyncio.wait_for(sending, WITHIN_S)
            return taken
        reading = asyncio.create_task(_read(greed, connection, taken))
        try:
            await asyncio.wait_for(reading, WITHIN_S)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
    return taken


async def _send(greed: Greed, target: Target, connection: socket.socket, taken: Taken) -> None:
    """Send until the server has closed; a socket that is full waits."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):
        for piece in greed.pieces(target):
            await loop.sock_sendall(connection, piece)
            taken.num_sent += len(piece)
            if taken.num_sent > SENDS_AT_MOST:
                return
            await asyncio.sleep(greed.pause_s)
        return
    taken.is_closed = True


async def _read(greed: Greed, connection: socket.socket, taken: Taken) -> None:
    """Read until the server has closed, or the answer to a whole body is here; keep the beginning."""
    loop = asyncio.get_running_loop()
    try:
        while said := await loop.sock_recv(connection, PIECE):
            taken.answer += said if len(taken.answer) < PIECE else b""
            if greed.is_whole:
                return
    except ConnectionError:
        pass
    taken.is_closed = True


def _with_length(target: Target, body: bytes, *headers: str) -> bytes:
    return target.body_head(f"Content-Length: {len(body)}", *headers) + body


def _whole(body: Callable[[int], bytes], *headers: str, num_bytes: int = 60_000) -> Greed:
    """Greed of a body that is whole and within the bounds: what it costs is in what it says."""
    return Greed(lambda _target: b"", lambda target: _with_length(target, body(num_bytes), *headers), is_whole=True)


def _chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


def _form_head(target: Target) -> bytes:
    return target.body_head("Transfer-Encoding: chunked", content_type="multipart/form-data; boundary=b")


def _chunked_head(target: Target) -> bytes:
    return target.body_head("Transfer-Encoding: chunked")


def _url(target: Target) -> bytes:
    return f"{target.verb.upper()} {target.path}{'&' if '?' in target.path else '?'}a=".encode()


def _gzip_head(target: Target) -> bytes:
    return target.body_head("Transfer-Encoding: chunked", "Content-Encoding: gzip")


BOMB = gzip.compress(bytes(32 * 2**20))[:20_000]  # 20 MB once it is unpacked; there is no end
FILE = b'Content-Disposition: form-data; name="file"; filename="f"\r\n'

GREED: dict[str, Greed] = {
    "a URL": Greed(_url, lambda _: b"a"),
    "a header": Greed(lambda target: target.head() + b"X-A: ", lambda _: b"a"),
    "a header's name": Greed(lambda target: target.head(), lambda _: b"a"),
    "headers": Greed(lambda target: target.head(), lambda _: b"X-A: b\r\n"),
    "empty lines": Greed(lambda _: b"", lambda _: b"\r\n"),
    "a body": Greed(lambda target: target.body_head(f"Content-Length: {2**50}"), lambda _: b"[" * 1000),
    "a length of two bounds": Greed(lambda target: target.body_head(f"Content-Length: {10**30}"), lambda _: b"["),
    "a body in chunks": Greed(_chunked_head, lambda _: _chunk(b" " * 10_000)),
    "a body in chunks of a byte": Greed(_chunked_head, lambda _: _chunk(b" ")),
    "an extension": Greed(lambda target: _chunked_head(target) + b"1;a=", lambda _: b"b"),
    "extensions": Greed(_chunked_head, lambda _: _chunk(b" ", b";a=" + b"b" * 30_000)),
    "trailers": Greed(lambda target: _chunked_head(target) + b"0\r\n", lambda _: b"X-A: b\r\n"),
    "a packed body": Greed(_gzip_head, lambda _: _chunk(BOMB)),
    "a bomb": Greed(lambda target: _gzip_head(target) + _chunk(BOMB), lambda _: _chunk(b"")[:3]),
    "a form's part": Greed(_form_head, lambda _: _chunk(b"--b\r\n" + FILE + b"\r\nx\r\n")),
    "a form's headers": Greed(lambda target: _form_head(target) + _chunk(b"--b\r\n"), lambda _: _chunk(b"X-A: b\r\n")),
    "a form's end": Greed(
        lambda target: _form_head(target) + _chunk(b"--b\r\n" + FILE + b"\r\nx\r\n--b--"),
        lambda _: _chunk(b"\r\n" * 99),
    ),
    "bytes of a head, slowly": Greed(lambda target: target.head(), lambda _: b"a", pause_s=0.01, is_answered=False),
    "bytes of a body, slowly": Greed(
        lambda target: target.body_head("Content-Length: 50000"), lambda _: b"[", pause_s=0.01
    ),
    "chunks, slowly": Greed(_chunked_head, lambda _: _chunk(b"["), pause_s=0.01),
    "requests unread": Greed(
        lambda _: b"", lambda target: _with_length(target, b"{}"), is_deaf=True, is_answered=False
    ),
    "depth": _whole(lambda size: b'{"prompt": ' + b"[" * (size // 2) + b"]" * (size // 2) + b"}"),
    "depth of objects": _whole(lambda size: b'{"a":' * (size // 6) + b"1" + b"}" * (size // 6)),
    "a number": _whole(lambda size: b'{"prompt": "x", "max_tokens": ' + b"9" * size + b"}"),
    "a fraction": _whole(lambda size: b'{"prompt": "x", "temperature": 0.' + b"9" * size + b"}"),
    "an exponent": _whole(lambda size: b'{"prompt": "x", "temperature": 1e' + b"9" * size + b"}"),
    "a key": _whole(lambda size: b'{"' + b"a" * size + b'": 1}'),
    "keys": _whole(lambda size: json.dumps({f"{n:x}": 0 for n in range(size // 10)}).encode()),
    "lists": _whole(lambda size: b'{"prompt": [' + b"[]," * (size // 3) + b"[]]}"),
    "turns": _whole(lambda size: b'{"messages": [' + b"{}," * (size // 3) + b"{}]}"),
    "weights": _whole(lambda size: b'{"prompt": "x", "adapters": [' + b"{}," * (size // 3) + b"{}]}"),
    "a bias": _whole(
        lambda size: json.dumps({"prompt": "x", "logit_bias": {str(n): 1 for n in range(size // 10)}}).encode()
    ),
    "escapes": _whole(lambda size: b'{"prompt": "' + b"\\u0000" * (size // 6) + b'"}'),
    "a string": _whole(lambda size: b'{"prompt": "' + "\U0001f600".encode() * (size // 4) + b'"}'),
}
