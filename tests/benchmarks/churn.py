"""What adapters that come and go cost others: versions swapped under clients, and more adapters than slots.

Both are asked of our own server twice, without and with the change, and the second is held against the first.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from typing import Any

import httpx2
import msgspec
import numpy as np

from tests.benchmarks.peers import Setup
from tests.kit.adapters import make_lora, zip_folder
from tests.kit.server import Server, serve

LORA: dict[str, Any] = {"r": 8, "strength": 0.2}
NUM_CLIENTS, NUM_VERSIONS, SWAPS_A_MINUTE = 8, 20, 200
NUM_SLOTS, NUM_STREAMS, NUM_ASKING = 8, 4, 4  # the adapters are 4 times as many as the slots
NUM_PROMPT, NUM_TOKENS = 32, 16
STREAM_TOKENS = 256  # of each of the running streams, one after another
TIMEOUT_S = 300.0
STEPS = ("swaps: before", "swaps: under swaps", "slots: all fit", "slots: 4x as many")


class Churn(msgspec.Struct):
    """What was measured; milliseconds. `cold` are requests that waited for an adapter, `load_ms` is of one load.

    `adapter_ms` is what adapters took of all steps of the last part, `stall_ms` what was a stall of that.
    """

    before_p95_ms: float | None = None
    swapping_p95_ms: float | None = None
    num_swaps: int = 0
    num_answers: int = 0
    num_faults: int = 0
    warm_gap_p99_ms: float | None = None
    cold_gap_p99_ms: float | None = None
    warm_ttft_p95_ms: float | None = None
    cold_ttft_p95_ms: float | None = None
    num_cold: int = 0
    num_loads: int = 0
    load_ms: float = 0.0
    adapter_ms: float = 0.0
    stall_ms: float = 0.0


class Answered(msgspec.Struct):
    """One streamed answer: milliseconds until its first and last event, the gaps between, and its wait for a load."""

    version: int | None
    ttft_ms: float
    total_ms: float
    load_ms: float
    gaps_ms: list[float]


def run(setup: Setup, corpus: list[int], seconds: float, into: Churn) -> Iterator[str]:
    """Measure every step into `into`; the name of each when it was measured."""
    prompts = [corpus[at : at + NUM_PROMPT] for at in range(0, len(corpus) - NUM_PROMPT, NUM_PROMPT)]
    folders = [make_lora(setup.scratch / f"churn-{seed}", setup.base, seed, **LORA) for seed in range(4 * NUM_SLOTS)]
    bodies = [zip_folder(folder) for folder in folders]
    with _server(setup, "swaps") as server:
        asyncio.run(_swaps(server, prompts, bodies[:NUM_VERSIONS], 0.0, seconds, into))
        yield STEPS[0]
        asyncio.run(_swaps(server, prompts, [], SWAPS_A_MINUTE / 60, seconds, into))
        yield STEPS[1]
    num_bytes = _slot_bytes(setup, bodies[0])
    room = {"slot_bytes": NUM_SLOTS * num_bytes, "host_bytes": NUM_SLOTS * num_bytes}  # what is not there is on disk
    with _server(setup, "slots", **room) as server:
        for number, body in enumerate(bodies):
            server.upload(f"a{number}", body)
        asyncio.run(_slots(server, prompts, NUM_SLOTS, seconds, into))
        yield STEPS[2]
        asyncio.run(_slots(server, prompts, len(bodies), seconds, into))
        yield STEPS[3]


@contextmanager
def _server(setup: Setup, name: str, **flags: Any) -> Iterator[Server]:
    data = setup.scratch / f"churn-data-{name}"
    with serve(setup.base, data, precision=setup.precision, num_threads=setup.num_threads, **flags) as server:
        yield server


def _slot_bytes(setup: Setup, body: bytes) -> int:
    with _server(setup, "size") as server:
        num_bytes: int = server.upload("size", body)["slot_bytes"]
        return num_bytes


async def _swaps(
    server: Server, prompts: list[list[int]], bodies: list[bytes], per_s: float, seconds: float, into: Churn
) -> None:
    """Clients ask one task; with `per_s` its version is swapped so often, by uploads and by routes in turn."""
    draw, routed, done = random.Random(0), [NUM_VERSIONS], 0
    async with _client(server) as client:
        for body in bodies:
            await asyncio.to_thread(server.upload, "s", body)

        async def swap() -> None:
            nonlocal done
            began = time.perf_counter()
            while per_s and time.perf_counter() - began < seconds:
                routed.append(draw.randrange(1, NUM_VERSIONS + 1))
                answer = await client.put("/tasks/s/route", json={"versions": {str(routed[-1]): 1}})
                into.num_faults += answer.status_code != httpx2.codes.OK
                done += 1
                await asyncio.sleep(max(0.0, began + done / per_s - time.perf_counter()))

        async def ask(number: int) -> None:
            oldest = done
            found = await _ask(client, "s", prompts[number % len(prompts)], NUM_TOKENS)
            into.num_answers += 1
            if found is None or found.version not in routed[oldest:]:
                into.num_faults += 1
            else:
                latencies.append(found.total_ms)

        latencies: list[float] = []
        swapping = asyncio.create_task(swap())
        await _keep_asking(ask, NUM_CLIENTS, seconds)
        await swapping
    into.num_swaps += done
    if per_s:
        into.swapping_p95_ms = _percentile(latencies, 95)
    else:
        into.before_p95_ms = _percentile(latencies, 95)


async def _slots(server: Server, prompts: list[list[int]], num_adapters: int, seconds: float, into: Churn) -> None:
    """Streams of adapters run without end, while others ask `num_adapters` adapters uniformly."""
    draw, gaps, asked = random.Random(0), list[float](), list[Answered]()
    async with _client(server) as client:
        for number in range(NUM_SLOTS):  # into their slots
            await _ask(client, f"a{number}", prompts[number], 1)
        before = await _counters(client)

        async def stream(number: int) -> None:
            found = await _ask(client, "base", prompts[number % len(prompts)], STREAM_TOKENS)
            gaps.extend(found.gaps_ms if found else [])

        async def ask(number: int) -> None:
            task = f"a{draw.randrange(num_adapters)}"
            found = await _ask(client, task, prompts[-1 - number % len(prompts)], NUM_TOKENS)
            asked.extend([found] if found else [])

        await asyncio.gather(_keep_asking(stream, NUM_STREAMS, seconds), _keep_asking(ask, NUM_ASKING, seconds))
        after = await _counters(client)
    warm = [one.ttft_ms for one in asked if not one.load_ms]
    if num_adapters == NUM_SLOTS:
        into.warm_gap_p99_ms, into.warm_ttft_p95_ms = _percentile(gaps, 99), _percentile(warm, 95)
        return
    cold = [one.ttft_ms for one in asked if one.load_ms]
    into.cold_gap_p99_ms, into.cold_ttft_p95_ms = _percentile(gaps, 99), _percentile(cold, 95)
    into.num_cold, into.num_loads = len(cold), int(after["loads"] - before["loads"])
    into.load_ms = 1e3 * (after["load_seconds"] - before["load_seconds"]) / max(1, into.num_loads)
    into.adapter_ms = 1e3 * (after["adapter_seconds"] - before["adapter_seconds"])
    into.stall_ms = 1e3 * (after["stall_seconds"] - before["stall_seconds"])


async def _keep_asking(ask: Callable[[int], Awaitable[None]], num_clients: int, seconds: float) -> None:
    """So many clients ask, each one request after another."""
    until, numbers = time.perf_counter() + seconds, iter(range(10**9))

    async def client() -> None:
        while time.perf_counter() < until:
            await ask(next(numbers))

    await asyncio.gather(*(client() for _ in range(num_clients)))


@asynccontextmanager
async def _client(server: Server) -> Any:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx2.AsyncClient(base_url=server.url, timeout=TIMEOUT_S, limits=limits) as client:
        yield client


async def _ask(client: httpx2.AsyncClient, task: str, prompt: list[int], num_tokens: int) -> Answered | None:
    """One streamed answer; None where it was refused or broke off."""
    body = {"prompt_token_ids": prompt, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    began, times, lines = time.perf_counter(), list[float](), list[str]()
    async with client.stream("POST", f"/generate?task={task}", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                times.append(1e3 * (time.perf_counter() - began))
                lines.append(line.removeprefix("data: "))
    if response.status_code != httpx2.codes.OK or len(lines) < 2 or lines[-1] != "[DONE]":
        return None
    last = msgspec.json.decode(lines[-2])
    version = last["adapter"]["version"] if last["adapter"] else None
    gaps = [after - before for before, after in pairwise(times[:-1])]
    return Answered(version, last["timing"]["ttft_ms"], times[-1], last["timing"]["load_ms"], gaps)


async def _counters(client: httpx2.AsyncClient) -> dict[str, float]:
    """The engine's counters of loads; they come a second late at most."""
    await asyncio.sleep(1.5)
    text = (await client.get("/metrics")).raise_for_status().text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    names = ("loads", "load_seconds", "adapter_seconds", "stall_seconds")
    return {name: float(lines[f"manyhats_engine_{name}_total"]) for name in names}


def _percentile(values: list[float], percent: int) -> float | None:
    return float(np.percentile(values, percent)) if values else None
