"""`python -m tests.benchmarks.fairness`: two tenants on a real server, how they share it, what one feels of the other.

Both figures are counted by the clients: tokens of whole answers and their prompts, and waits for a first token.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx2
import msgspec
from rich.console import Console
from rich.table import Table

from adapters_store.base.resolve import resolve_base
from tests.kit.server import serve

ADMIN_KEY = "the key of the fairness bench"
MOST_S = 900.0
LEAST_RATIO, MOST_RATIO, MOST_WAIT = 0.8, 1.25, 3.0
MOST_PROMPT, TOKENS = 1000, (10, 250)  # ids that every base has


@dataclass(frozen=True)
class Shape:
    """What a tenant asks: how long prompts are (from, to), how long answers, and from how many clients at once."""

    prompt: tuple[int, int]
    answer: int
    num_clients: int
    think_s: float = 0.0


CROWDS = {
    "alike": (Shape((128, 129), 64, 32), Shape((128, 129), 64, 32)),
    "long prompts / long answers": (Shape((400, 401), 16, 32), Shape((16, 17), 200, 32)),
}
LOUD, MODEST = Shape((MOST_PROMPT // 2, MOST_PROMPT), 64, 64), Shape((64, 320), 24, 1, think_s=0.5)


@dataclass
class Got:
    """What a tenant got: (when, how many tokens) of each step's event, and waits for a first token."""

    tokens: list[tuple[float, int]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def between(self, began: float, ended: float) -> int:
        """Tokens in a time."""
        return sum(count for at, count in self.tokens if began <= at < ended)

    def p95(self) -> float:
        """Of the waits; endless where nobody got a token."""
        waits = sorted(self.waits)
        return waits[min(len(waits) - 1, int(0.95 * len(waits)))] if waits else inf


def main() -> None:
    """Print a table: each pair of tenants, its figure, and what it must be."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fairness", description=__doc__)
    parser.add_argument("--base", default="smollm2-135m", help="a name, a folder or a hub id")
    parser.add_argument("--seconds", type=float, default=60, help="that each pair is measured for")
    parser.add_argument("--warm-up", type=float, default=10, help="seconds before, which do not count")
    arguments, console = parser.parse_args(), Console()
    base = resolve_base(arguments.base, progress=console.print)
    table = Table("two tenants", "figure", "must be", "")
    with _server(base) as url:
        for what, figure, wanted, is_met in measure(url, arguments.seconds, arguments.warm_up):
            table.add_row(what, figure, wanted, "yes" if is_met else "NO")
    console.print(table)


@contextmanager
def _server(base: Path) -> Iterator[str]:
    key = {"MANYHATS_ADMIN_KEY": ADMIN_KEY}
    with tempfile.TemporaryDirectory() as data, patch.dict(os.environ, key), serve(base, Path(data)) as server:
        yield server.url


def measure(url: str, seconds: float, warm_up: float) -> Iterator[tuple[str, str, str, bool]]:
    """(what, figure, what it must be, whether it is) of every pair."""
    for share in (1.0, 3.0):
        keys = [_tenant(url, f"one-{share:g}", share), _tenant(url, f"other-{share:g}", 1.0)]
        for name, shapes in CROWDS.items():
            began = time.perf_counter() + warm_up
            one, other = asyncio.run(_beside(url, list(zip(keys, shapes, strict=True)), warm_up + seconds))
            ratio = one.between(began, began + seconds) / max(1, other.between(began, began + seconds)) / share
            wanted = f"{LEAST_RATIO} to {MOST_RATIO}"
            yield f"tokens, shares {share:g}:1, {name}", f"{ratio:.2f}", wanted, LEAST_RATIO <= ratio <= MOST_RATIO
    loud, modest = _tenant(url, "loud", 1.0), _tenant(url, "modest", 1.0)
    (alone,) = asyncio.run(_beside(url, [(modest, MODEST)], seconds))
    _, beside = asyncio.run(_beside(url, [(loud, LOUD), (modest, MODEST)], 2 * seconds))
    ratio = beside.p95() / alone.p95()
    figure = f"{ratio:.2f} ({1e3 * alone.p95():.0f} -> {1e3 * beside.p95():.0f} ms, {len(beside.waits)} requests)"
    yield "p95 of first tokens beside 64 long prompts / alone", figure, f"at most {MOST_WAIT:g}", ratio <= MOST_WAIT


def _tenant(url: str, name: str, share: float) -> str:
    """A new tenant; its key."""
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    tenant, key = {"name": name, "limits": {"share": share}}, {"scopes": ["generate"]}
    httpx2.post(f"{url}/tenants", json=tenant, headers=headers).raise_for_status()
    made = httpx2.post(f"{url}/tenants/{name}/keys", json=key, headers=headers).raise_for_status()
    sent: str = made.json()["key"]
    return sent


async def _beside(url: str, crowds: list[tuple[str, Shape]], seconds: float) -> list[Got]:
    """Let every crowd ask for so long; what each got. What is on its way when the time ends is broken off."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx2.AsyncClient(base_url=url, timeout=MOST_S, limits=limits) as client:
        got = [Got() for _ in crowds]
        work: list[Coroutine[Any, Any, None]] = [
            _client(client, key, shape, one, random.Random(f"{key} {number}"))
            for (key, shape), one in zip(crowds, got, strict=True)
            for number in range(shape.num_clients)
        ]
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*work)
        return got


async def _client(client: httpx2.AsyncClient, key: str, shape: Shape, got: Got, draw: random.Random) -> None:
    """Ask, take the answer, think, ask again."""
    while True:
        prompt = [draw.randrange(*TOKENS) for _ in range(draw.randrange(*shape.prompt))]
        body = {
            "prompt_token_ids": prompt,
            "max_tokens": shape.answer,
            "ignore_eos": True,
            "stream": True,
            "timeout_s": MOST_S,
        }
        began, is_first = time.perf_counter(), True
        options: Any = {"params": {"task": "base"}, "json": body, "headers": {"Authorization": f"Bearer {key}"}}
        async with client.stream("POST", "/generate", **options) as response:
            if response.status_code != httpx2.codes.OK:
                raise RuntimeError(f"{response.status_code}: {(await response.aread())[:500]!r}")
            async for line in response.aiter_lines():
                now = time.perf_counter()
                if not line.startswith("data: {"):
                    continue
                num_tokens = len(msgspec.json.decode(line[6:])["token_ids"])
                got.tokens.append((now, num_tokens + (len(prompt) if is_first else 0)))
                got.waits += [now - began] if is_first else []
                is_first = False
        await asyncio.sleep(shape.think_s)


if __name__ == "__main__":
    main()
