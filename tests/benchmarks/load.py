"""The load: requests over HTTP, so many at once or at given times, streamed, timed, and checked to be complete."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from http import HTTPStatus
from itertools import pairwise
from typing import Any

import aiohttp
import msgspec

from tests.benchmarks.dialects import Dialect, Manyhats
from tests.benchmarks.results import Timing
from tests.benchmarks.workload import Prompted

LIMIT_S = 900.0  # of one workload: a server that hangs does not hang the bench
OURS = Manyhats()

TaskOf = Callable[[int], str]
Asked = tuple[float, list[Timing]]  # seconds of it all, each request's timing


def ask_all(
    url: str,
    requests: list[Prompted],
    concurrency: int,
    task_of: TaskOf,
    on_done: Callable[[], None],
    dialect: Dialect = OURS,
) -> Asked:
    """Closed loop: `concurrency` clients take the requests in order.

    Raises `IncompleteAnswerError` at the first request that did not get all its tokens, `TimeoutError` after `LIMIT_S`.
    """
    waiting = iter(requests)

    def clients(client: aiohttp.ClientSession, began: float, timings: list[Timing]) -> list[Coroutine[Any, Any, None]]:
        async def work() -> None:
            for request in waiting:
                timings.append(await ask(client, request, _task(request, task_of), began, dialect))
                on_done()

        return [work() for _ in range(concurrency)]

    return asyncio.run(_together(url, clients))


def ask_on_time(
    url: str, requests: list[Prompted], arrivals: list[float], task_of: TaskOf, on_done: Callable[[], None]
) -> Asked:
    """Open loop: request i is sent `arrivals[i]` seconds after the start, however many still wait.

    Its times count from when it was to be sent, so that a late client makes nothing look fast. Raises as `ask_all`.
    """

    def clients(client: aiohttp.ClientSession, began: float, timings: list[Timing]) -> list[Coroutine[Any, Any, None]]:
        async def send(request: Prompted, arrival: float) -> None:
            await asyncio.sleep(began + arrival - time.perf_counter())
            timing = await ask(client, request, _task(request, task_of), began)
            timings.append(msgspec.structs.replace(timing, started=arrival))
            on_done()

        return [send(*one) for one in zip(requests, arrivals, strict=True)]

    return asyncio.run(_together(url, clients))


def _task(request: Prompted, task_of: TaskOf) -> str:
    return "base" if request.adapter is None else task_of(request.adapter)


async def _together(
    url: str, clients: Callable[[aiohttp.ClientSession, float, list[Timing]], list[Coroutine[Any, Any, None]]]
) -> Asked:
    timings: list[Timing] = []
    async with _client(url) as client, asyncio.timeout(LIMIT_S):
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for one in clients(client, began, timings):
                group.create_task(one)
        return time.perf_counter() - began, timings


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A client that takes little for itself, 0.3 s of CPU for all of W4: the load shares the cores with the server."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # a server may close an idle connection at any time
    timeout = aiohttp.ClientTimeout(total=LIMIT_S)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as client:
        yield client


async def ask(
    client: aiohttp.ClientSession, request: Prompted, task: str, began: float, dialect: Dialect = OURS
) -> Timing:
    """Stream one request's answer. Raises `IncompleteAnswerError`."""
    started, times, lines, is_done = time.perf_counter() - began, list[float](), list[bytes](), False
    async with client.post(**dialect.request(request, task, LIMIT_S)) as response:
        if response.status != HTTPStatus.OK:
            raise dialect.error(f"{response.status}: {(await response.read())[:500]!r}")
        async for line in response.content:
            if line.startswith(b"data: [DONE]"):
                is_done = True
            elif line.startswith(b"data: "):
                times.append(time.perf_counter() - began)
                lines.append(line.removeprefix(b"data: "))
    ended = time.perf_counter() - began
    events = [msgspec.json.decode(line) for line in lines]  # only now: it takes time from the server
    dialect.check(request, events, is_done)
    pieces = [(at, dialect.size(event)) for at, event in zip(times, events, strict=True) if dialect.is_piece(event)]
    gaps = [after - before for (before, _), (after, _) in pairwise(pieces)]
    sizes = [size for _, size in pieces]
    return Timing(len(request.prompt), request.max_tokens, started, ended, pieces[0][0], gaps, sizes)
