"""A client that leaves ends the work for it, whole or streamed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.api.disconnect import ClientGoneError, unless_disconnected

pytestmark = pytest.mark.anyio


async def never() -> dict[str, Any]:
    """Receive nothing: the client stays."""
    await asyncio.Event().wait()
    return {}


async def test_work_that_ends_first() -> None:
    """The result of the work is returned, or its error raised, if the client stays."""

    async def fail() -> None:
        raise KeyError("a")

    assert await unless_disconnected(never, asyncio.sleep(0, "done")) == "done"
    with pytest.raises(KeyError):
        await unless_disconnected(never, fail())


async def test_a_client_that_leaves_first() -> None:
    """The work is cancelled, and has ended once `ClientGoneError` is raised; other messages do not count."""
    messages, is_ended = iter(["http.request", "http.disconnect"]), asyncio.Event()

    async def receive() -> dict[str, Any]:
        return {"type": next(messages)}

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            is_ended.set()

    with pytest.raises(ClientGoneError):
        await unless_disconnected(receive, work())
    assert is_ended.is_set()
