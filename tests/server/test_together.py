"""Coroutines that run together end together, and none that the server needs ends unseen."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator

import pytest

from server.together import for_ever, together

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


@pytest.fixture
def signals() -> Iterator[list[int]]:
    """The signals that this process was told to end by."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: heard.append(number))
    yield heard
    signal.signal(signal.SIGTERM, before)


async def test_a_task_that_must_not_end_tells_the_process(signals: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """A task that fails ends the process with its reason in the log; one that ends or is cancelled does not."""

    async def fail() -> None:
        raise KeyError("the reason")

    await for_ever(asyncio.sleep(0), "a task that ends")
    cancelled = for_ever(asyncio.sleep(60), "a task that is cancelled")
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    assert not signals
    await asyncio.gather(for_ever(fail(), "the task"), return_exceptions=True)
    assert signals == [signal.SIGTERM]
    assert "the task failed; the server ends" in caplog.text and "the reason" in caplog.text
