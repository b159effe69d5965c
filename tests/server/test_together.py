"""Coroutines that run together end together."""

from __future__ import annotations

import asyncio

import pytest

from server.together import together

pytestmark = pytest.mark.anyio


async def test_results_in_order() -> None:
    """Results come in the order of the coroutines, whichever ends first."""
    assert await together(asyncio.sleep(0.01, "slow"), asyncio.sleep(0, "fast")) == ["slow", "fast"]


async def test_the_first_failure_ends_the_others() -> None:
    """The first failure is raised as it is, in no group, after the others are cancelled."""
    is_cancelled = asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            is_cancelled.set()
            raise

    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("a")

    with pytest.raises(KeyError):
        await together(wait(), fail())
    assert is_cancelled.is_set()
