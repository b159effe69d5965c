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
    started, times, lines, is_done = time.perf_counter() - began, list[float](), list[str](), False
    async with client.stream("POST", "/generate", params={"task": task}, json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise IncompleteAnswerError(f"{response.status_code}: {(await response.aread())[:500]!r}")
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                times.append(time.perf_counter() - began)
                lines.append(line.removeprefix("data: "))
    ended = time.perf_counter() - began
    events = [msgspec.json.decode(line) for line in lines]  # only now: it takes time from the server
    _check(request, events[-1] if events else {}, is_done)
    gaps = [after - before for before, after in pairwise(times)]
    sizes = [len(event.get("token_ids", ())) for event in events]
    return Timing(len(request.prompt), request.max_tokens, started, ended, times[0], gaps, sizes)


def _check(request: Prompted, last: dict[str, Any], is_done: bool) -> None:
    usage = last.get("usage", {})
    num_tokens, num_virtual = usage.get("completion_tokens"), usage.get("virtual_tokens", 0)
    if not is_done or num_tokens != request.max_tokens:
        raise IncompleteAnswerError(f"{num_tokens} of {request.max_tokens} tokens came; the last event was {last}")
    if num_virtual != request.num_virtual:
        raise IncompleteAnswerError(f"{num_virtual} virtual tokens came before it instead of {request.num_virtual}")
