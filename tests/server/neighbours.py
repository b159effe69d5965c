"""What well-behaved streams cost alone and beside bad company: `python -m tests.server.neighbours --help`.

The company is a greedy client, each kind in turn over every route; requests that the engine or the API refuses or
fails; and answers in forms, hostile ones and different schemas, so many a second. The figures that count are ratios:
CPU seconds a token, of front and engine together, at most 1.3; and beside forms the gap between two tokens (p95), at
most 1.2.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from adapters_store.base.resolve import resolve_base
from tests.kit.adapters import make_lora, zip_folder
from tests.kit.greedy_client import GREED, Target, be_greedy
from tests.kit.load import Asked, load, solo
from tests.kit.schemas import HOSTILE, schema_of
from tests.kit.server import Server, serve
from tests.kit.tiny import make_tiny_base

NUM_NEIGHBOURS = 8
BORDER, GAP_BORDER = 1.3, 1.2
POISONED: tuple[dict[str, Any], ...] = (  # each is legal until it is computed, or too much to be
    {"prompt": "x", "max_tokens": 8, "temperature": 1e-3, "logit_bias": {"65": 100}, "presence_penalty": 2},
    {"prompt": "x", "max_tokens": 8, "temperature": 100, "repetition_penalty": 0.01, "frequency_penalty": -2},
    {"prompt": "x", "timeout_s": 0.001},
    {"prompt": "x" * 4_000_000},
    {"prompt": [[]] * 100_000},
    {"prompt": "x", "adapters": [{"task": "hat", "weight": 100.0}], "temperature": 1},
    {"prompt": "x", "adapters": [{"task": "hat", "weight": -100.0}], "logprobs": 5},
)


@dataclass
class Cost:
    """CPU seconds of the server's processes while its neighbours got so many tokens, and the gap between two (p95)."""

    seconds: float
    num_tokens: int
    gap: float

    @property
    def each(self) -> float:
        """The seconds a token."""
        return self.seconds / self.num_tokens


def cpu_seconds(server: Server) -> float:
    """What the front, the engine and the loaders have used so far."""
    times = [process.cpu_times() for process in server.processes()]
    return float(sum(one.user + one.system for one in times))


async def cost_beside(server: Server, seconds: float, company: Coroutine[Any, Any, None] | None) -> Cost:
    """What neighbours cost while the company is there; every answer is checked against the one that it gets alone."""
    async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
        asked = [
            Asked(
                ("base", "hat")[at % 2], {"prompt": f"Tell me {at}: ", "max_tokens": 64, "ignore_eos": True, "seed": at}
            )
            for at in range(NUM_NEIGHBOURS)
        ]
        right = await solo(http, asked)
        beside = None if company is None else asyncio.create_task(company)
        try:
            before = cpu_seconds(server)
            report = await load(http, asked, right, num_clients=NUM_NEIGHBOURS, seconds=seconds)
            used = cpu_seconds(server) - before
        finally:
            if beside is not None:
                beside.cancel()
                await asyncio.gather(beside, return_exceptions=True)
    assert not report.mismatches and set(report.statuses) == {200}, (report.statuses, report.mismatches[:1])
    return Cost(used, 64 * report.num_right, report.percentile(report.gaps, 0.95))


async def poison(server: Server, rate: float) -> None:
    """Ask what fails or is refused, so many times a second."""
    async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http, asyncio.TaskGroup() as group:
        for body in itertools.cycle(POISONED):
            task = "" if "adapters" in body else "?task=base"
            group.create_task(_ask(http, f"/generate{task}", body))
            await asyncio.sleep(1 / rate)


async def _ask(http: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> None:
    with contextlib.suppress(httpx2.TransportError):
        await http.post(path, content=json.dumps(body))


async def forms(server: Server, rate: float) -> None:
    """Ask for answers in forms, hostile ones and schemas that were never asked for in turn, so many times a second."""
    chance, hostile = random.Random(0), itertools.cycle(HOSTILE)
    async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http, asyncio.TaskGroup() as group:
        for number in itertools.count():
            kind, value = next(hostile) if number % 2 else ("json_schema", schema_of(chance))
            key = {"json_schema": "schema", "choice": "choices"}.get(kind, kind)
            body = {"prompt": f"x{number}", "max_tokens": 32, "response_format": {"type": kind, key: value}}
            group.create_task(_ask(http, f"/generate?task={('base', 'hat')[number % 4 // 2]}", body))
            await asyncio.sleep(1 / rate)


async def greed(server: Server, rate: float) -> None:
    """Be greedy in every way at every route, so many times a second."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    async with httpx2.AsyncClient(base_url=server.url) as http:
        paths = (await http.get("/openapi.json")).json()["paths"]
    names = {"task": "one", "number": "1", "name": "base", "tenant": "acme", "key_id": "mh_aaaaaaaaaaaa"}
    targets = [Target(verb, path.format(**names)) for path, verbs in paths.items() for verb in verbs]
    async with asyncio.TaskGroup() as group:
        for way, target in itertools.product(GREED.values(), targets) if rate else ():
            group.create_task(_be_greedy(way, target, (host, int(port))))
            await asyncio.sleep(1 / rate)


async def _be_greedy(way: Any, target: Target, address: tuple[str, int]) -> None:
    with contextlib.suppress(TimeoutError, ConnectionError):
        await be_greedy(way, target, address)


async def main() -> int:
    """Run the command. Returns 1 if a ratio is above the border."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="tiny", help="tiny, or what `manyhats serve --base` takes")
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--rate", type=float, default=1, help="of the company's requests a second")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        base = make_tiny_base(scratch / "base") if given.base == "tiny" else resolve_base(given.base)
        hat = zip_folder(make_lora(scratch / "hat", base))
        with serve(base, scratch / "data", kv_cache_bytes=2**28, num_threads=1) as server:
            server.upload("hat", hat)
            await cost_beside(server, min(5, given.seconds), None)  # warm
            ratios, gaps = [], []
            for name, company in {"poison": poison, "greed": greed, "forms": forms}.items():
                alone = await cost_beside(server, given.seconds, None)
                beside = await cost_beside(server, given.seconds, company(server, given.rate))
                if company is not forms:  # which ask for tokens of their own
                    ratios.append(beside.each / alone.each)
                gaps.append(beside.gap / alone.gap)
                told = (
                    f"{1e3 * alone.each:.3f} ms of CPU a token alone, {1e3 * beside.each:.3f} beside, "
                    f"{beside.each / alone.each:.2f} times; gap {gaps[-1]:.2f} times"
                )
                print(f"{name}: {told}", flush=True)
    return int(max(ratios) > BORDER or gaps[-1] > GAP_BORDER)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
