"""The load: so many requests at once over HTTP, streamed, timed, and checked to be complete."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx
import msgspec

from tests.benchmarks.results import Timing
from tests.benchmarks.workload import Prompted

TIMEOUT_S = 900.0


class IncompleteAnswerError(Exception):
    """The server did not answer in full; its figures would be of no worth."""


def ask_all(
    url: str, requests: list[Prompted], concurrency: int, task_of: Callable[[int], str], on_done: Callable[[], None]
) -> tuple[float, list[Timing]]:
    """Closed loop: `concurrency` clients take the requests in order. -> (seconds of it all, each request's timing).

    Raises `IncompleteAnswerError` at the first request that did not get all its tokens.
    """
    return asyncio.run(_ask_all(url, requests, concurrency, task_of, on_done))


async def _ask_all(
    url: str, requests: list[Prompted], concurrency: int, task_of: Callable[[int], str], on_done: Callable[[], None]
) -> tuple[float, list[Timing]]:
    timings: list[Timing] = []
    waiting = iter(requests)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        began = time.perf_counter()

        async def work() -> None:
            for request in waiting:
                task = "base" if request.adapter is None else task_of(request.adapter)
                timings.append(await ask(client, request, task, began))
                on_done()

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
        return time.perf_counter() - began, timings


async def ask(client: httpx.AsyncClient, request: Prompted, task: str, began: float) -> Timing:
    """Stream one request's answer. Raises `IncompleteAnswerError`."""
    body = {
        "prompt_token_ids": request.prompt,
        "max_tokens": request.max_tokens,
        "ignore_eos": True,
        "stream": True,
        "timeout_s": TIMEOUT_S,
    }
    started, times, last, is_done = time.perf_counter() - began, [], b"", False
    async with client.stream("POST", "/generate", params={"task": task}, json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise IncompleteAnswerError(f"{response.status_code}: {(await response.aread())[:500]!r}")
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                times.append(time.perf_counter() - began)
                last = line.removeprefix("data: ").encode()
    _check(request, msgspec.json.decode(last or b"{}"), is_done)
    gaps = [after - before for before, after in pairwise(times)]
    return Timing(len(request.prompt), request.max_tokens, started, time.perf_counter() - began, times[0], gaps)


def _check(request: Prompted, last: dict[str, Any], is_done: bool) -> None:
    num_tokens = last.get("usage", {}).get("completion_tokens")
    if not is_done or num_tokens != request.max_tokens:
        raise IncompleteAnswerError(f"{num_tokens} of {request.max_tokens} tokens came; the last event was {last}")
