"""Bodies as they come: in time, under the cap, and without standing in anyone's way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server.api.body import parse, validated
from server.api.openai import ChatRequest
from server.errors import InvalidFieldError
from tests.server.world import Site, error_of, serve_site

pytestmark = pytest.mark.anyio


async def test_a_long_body_stalls_nobody(shared: Site) -> None:
    """Parsing a long body keeps no other request waiting."""
    body = json.dumps({"prompt_token_ids": [1] * 1_000_000})
    long = asyncio.create_task(shared.post("/generate?task=base", body))
    num_answered = 0
    while not long.done():
        assert (await shared.http.get("/health/live")).status_code == 200
        num_answered += 1
        await asyncio.sleep(0.001)  # in memory an answer comes without a pause for others
    assert (await long).status_code == 400
    assert num_answered > 5


async def test_a_body_that_says_it_is_too_long(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A body whose length is over the cap is 413 before it comes, an upload too."""
    async with serve_site(tiny_base, tmp_path, max_body_bytes=1000, max_upload_bytes=1000) as site:
        for path in ("/generate?task=base", "/adapters?task=a"):
            reader, writer = await asyncio.open_connection("127.0.0.1", site.http.base_url.port)
            head = (
                f"POST {path} HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/zip\r\nContent-Length: 1001\r\n\r\n"
            )
            writer.write(head.encode())
            assert b"413" in await asyncio.wait_for(reader.readline(), 5)
            writer.close()


async def test_an_upload_without_an_engine(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """An upload without an engine, which could not be validated, is 503 before its body comes."""
    async with serve_site(tiny_base, tmp_path) as site:
        site.engine.die()
        reader, writer = await asyncio.open_connection("127.0.0.1", site.http.base_url.port)
        writer.write(
            b"POST /adapters?task=a HTTP/1.1\r\nHost: [::1]\r\n"
            b"Content-Type: application/zip\r\nContent-Length: 99\r\n\r\n"
        )
        assert b"503" in await asyncio.wait_for(reader.readline(), 5)
        writer.close()


async def test_a_body_that_crawls(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that comes a byte now and then is 400 after its time, however often a byte comes; a fast one has more."""

    async def crawling(size: int, parts: int) -> AsyncIterator[bytes]:
        for _ in range(parts):
            yield b" " * size
            await asyncio.sleep(0.05)

    monkeypatch.setattr("server.api.body.MIN_BYTES_PER_S", 10_000)
    async with serve_site(tiny_base, tmp_path, body_timeout_s=0.3) as site:
        for path in ("/generate?task=base", "/adapters?task=a"):
            headers = {"Content-Type": "application/zip"}
            slow = await site.http.post(path, content=crawling(1, 14), headers=headers)
            assert slow.status_code == 400 and "bytes a second" in error_of(slow)["message"]
            fast = await site.http.post(path, content=crawling(2000, 10), headers=headers)
            assert "bytes a second" not in error_of(fast)["message"]


async def test_the_message_names_the_limit() -> None:
    """The message names the limit if one branch of a union has the right type and is over it, not the other type."""
    body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "a"}], "stop": ["a"] * 5})
    with pytest.raises(InvalidFieldError, match="stop: List should have at most 4 items"):
        validated(ChatRequest, parse(body.encode()))


LONG = "a" * 200_000
ASKED: list[tuple[str, dict[str, Any], str]] = [
    ("/generate?task=base", {"prompt": LONG}, "prompt"),
    ("/generate?task=base", {"prompt": ["a", LONG]}, "prompt"),
    ("/generate?task=base", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
    ("/generate?task=base", {"messages": [{"role": "user", "content": LONG[:100]}] * 2000}, "messages"),
    ("/v1/completions", {"model": "base", "prompt": LONG}, "prompt"),
    ("/v1/completions", {"model": "base", "prompt": [LONG, LONG]}, "prompt"),
    ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": LONG}]}, "messages"),
]


@pytest.mark.parametrize(("path", "body", "param"), ASKED, ids=[f"{path} {[*body][-1]}" for path, body, _ in ASKED])
async def test_what_cannot_fit_is_never_tokenised(
    shared: Site, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str
) -> None:
    """A text of more bytes than the longest tokens could hold is 400 by its bytes, on every route and in every form."""
    for room in (shared.state.tokenizer, shared.state.tokenizer.turns):
        monkeypatch.setattr(room, "encode", lambda *_: pytest.fail("it was tokenised"))
    refused = await shared.post(path, body)
    assert (refused.status_code, error_of(refused)["param"]) == (400, param)
    assert error_of(refused)["code"] == "context_length_exceeded"
    assert "context length is 400 tokens" in error_of(refused)["message"]
