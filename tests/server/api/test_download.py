"""A download streams from the store: no more of it is read than the client takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Scope

from adapters_store.format import zip_outline
from adapters_store.format.archive import zipped
from adapters_store.format.folder import WEIGHTS, read_files
from adapters_store.format.zip_outline import StoredFile
from server.errors import StoreUnavailableError
from tests.server.world import Site, open_site, until

pytestmark = pytest.mark.anyio
CHUNK = 64
PATH = "/tasks/a/versions/1/artifact"


class Counting:
    """Counts the bytes that are read of a store's files, from the second pass on: the first verifies them."""

    def __init__(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_read, self._open = 0, site.state.stores.blobs._open
        self.largest = 0
        monkeypatch.setattr(site.state.stores.blobs, "_open", self._counted)

    def _counted(self, digest: str) -> list[StoredFile]:
        return [StoredFile(file.name, file.num_bytes, self._reader(file)) for file in self._open(digest)]

    def _reader(self, file: StoredFile) -> Any:
        def read(start: int, stop: int) -> bytes:
            self.num_read += stop - start
            self.largest = max(self.largest, stop - start)
            return file.read(start, stop)

        return read


class Reader:
    """A client of the application itself, which takes one message at a time when `take` is called."""

    def __init__(self, site: Site, method: str = "GET") -> None:
        self.messages: list[Message] = []
        self._leaves, self._takes = asyncio.Event(), asyncio.Semaphore(0)
        self._is_asked = False
        scope: Scope = {"type": "http", "method": method, "path": PATH, "query_string": b"", "app": site.app}
        scope["headers"], scope["state"] = [(b"host", b"localhost")], {}
        self.answer = asyncio.create_task(site.app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if not self._is_asked:
            self._is_asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._leaves.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.messages.append(message)
        await self._takes.acquire()

    def take(self) -> None:
        """Take the message that was sent."""
        self._takes.release()

    def leave(self) -> None:
        """Close the connection."""
        self._leaves.set()

    @property
    def body(self) -> bytes:
        """What was sent of the body."""
        return b"".join(message.get("body", b"") for message in self.messages)


@pytest.fixture
async def large(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Site]:
    """A server with the task `a`, whose artifact is many chunks."""
    monkeypatch.setattr(zip_outline, "CHUNK", CHUNK)
    async with open_site(tiny_base, tmp_path / "data") as site:
        assert (await site.upload("a", zips[0])).status_code == 201
        yield site


async def test_nothing_is_read_before_the_client_takes_it(large: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each moment all that was read is sent; the whole is the artifact's zip, and its length is told before."""
    counting = Counting(large, monkeypatch)
    whole = zipped(read_files(large.state.stores.blobs.path(next(iter(large.stored())))))
    reader, num_taken = Reader(large), 0
    await until(lambda: reader.messages)
    num_verified = counting.num_read
    while not reader.answer.done():
        assert counting.num_read - num_verified <= len(reader.body)
        reader.take()
        num_taken += 1
        await until(lambda taken=num_taken: reader.answer.done() or len(reader.messages) > taken)
    assert reader.body == whole and counting.largest <= CHUNK < len(whole) / 8
    headers = dict(reader.messages[0]["headers"])
    assert int(headers[b"content-length"]) == len(whole) and headers[b"content-type"] == b"application/zip"


@pytest.mark.parametrize("num_taken", [0, 1, 5])
async def test_a_client_that_leaves_lets_the_artifact_go(
    large: Site, monkeypatch: pytest.MonkeyPatch, num_taken: int
) -> None:
    """However much a client took, nothing is read after it left, and the artifact is in no use any more."""
    counting, reader = Counting(large, monkeypatch), Reader(large)
    await until(lambda: reader.messages)
    assert large.state.retention.is_held(next(iter(large.stored())))
    for number in range(num_taken):
        reader.take()
        await until(lambda number=number: len(reader.messages) > number + 1)
    reader.leave()
    await reader.answer
    num_read = counting.num_read
    assert large.state.retention.is_idle
    await asyncio.sleep(0)
    assert counting.num_read == num_read and len(reader.messages) == num_taken + 1


async def test_head_reads_nothing_twice(large: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """HEAD has the headers of GET; the artifact is verified and not read again."""
    counting, got = Counting(large, monkeypatch), await large.http.get(PATH)
    num_read = counting.num_read
    head = await large.http.head(PATH)
    same = ("content-length", "content-type", "etag", "content-disposition")
    assert [head.headers[name] for name in same] == [got.headers[name] for name in same]
    assert head.content == b"" and counting.num_read - num_read == num_read / 2
    assert large.state.retention.is_idle


async def test_a_store_that_loses_bytes_meanwhile_breaks_the_answer_off(large: Site) -> None:
    """A client never takes a part for the whole: an artifact that is cut off while it is sent is no whole answer."""
    blobs = large.state.stores.blobs
    download = await large.state.uploads.download("default", "a", 1)
    chunks = [chunk async for chunk in download.chunks()]
    assert sum(map(len, chunks)) == download.outline.num_bytes
    path = blobs.path(download.digest) / WEIGHTS
    path.write_bytes(path.read_bytes()[:-CHUNK])
    with pytest.raises(StoreUnavailableError, match="was cut off while it was sent"):
        [chunk async for chunk in download.chunks()]
    await download.close()
