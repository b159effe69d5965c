"""Churn for a long time, and see that nothing grows: `python -m tests.server.soak --help`.

Tenants come and go; each uploads every method, asks every generating route plain and as streams, leaves some, errs,
moves its routes, and deletes what it made. Memory, file descriptors, threads and series are sampled and drawn;
what still grows after the first quarter fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from matplotlib.figure import Figure

from adapters_store.base.resolve import resolve_base
from tests.kit.adapters import zip_folder
from tests.kit.families import FAMILIES
from tests.kit.metrics import Reading
from tests.kit.server import serve
from tests.kit.tiny import make_tiny_base

KEY = "soak-" + "k" * 16
ADMIN = {"Authorization": f"Bearer {KEY}"}
NUM_WORKERS = 3
SAMPLE_EVERY_S = 3.0
BORDERS = {"memory": 0.06, "fds": 0.1, "threads": 0.1, "series": 0.05}  # growth over the rest that is none
GENERATING: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/generate", {"prompt": "abc"}),
    ("/v1/completions", {"prompt": "abc"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "abc"}]}),
)


@dataclass
class Samples:
    """What was measured: seconds, and by name one number each time."""

    seconds: list[float] = field(default_factory=list)
    numbers: dict[str, list[float]] = field(default_factory=dict)

    def add(self, seconds: float, numbers: Mapping[str, float]) -> None:
        """Add what was measured at a moment."""
        self.seconds.append(seconds)
        for name, number in numbers.items():
            self.numbers.setdefault(name, []).append(number)

    def growth(self, name: str) -> float:
        """By which part of itself a number grew after the first quarter, by the line through the rest."""
        begin = len(self.seconds) // 4
        seconds, numbers = np.array(self.seconds[begin:]), np.array(self.numbers[name][begin:])
        slope = float(np.polyfit(seconds, numbers, 1)[0])
        return slope * float(seconds[-1] - seconds[0]) / max(1.0, float(numbers.mean()))

    def grown(self) -> dict[str, float]:
        """The numbers that grew more than their border."""
        growths = {name: self.growth(name) for name in self.numbers}
        return {name: growth for name, growth in growths.items() if growth > BORDERS.get(name.split()[-1], np.inf)}


async def live_and_die(http: httpx2.AsyncClient, tenant: str, bodies: Mapping[str, bytes]) -> None:
    """Make a tenant, do as it all that a tenant may, and delete it; what must be taken is."""
    await _ok(http.post("/tenants", json={"name": tenant}, headers=ADMIN))
    scopes = {"scopes": ["generate", "deploy"]}
    made = await _ok(http.post(f"/tenants/{tenant}/keys", json=scopes, headers=ADMIN))
    mine = {"Authorization": f"Bearer {made['key']}"}
    try:
        for method, body in bodies.items():
            await _serve_task(http, method, body, mine)
        for path in ("/tasks", "/v1/models", "/health/ready", "/no/such/route"):
            await http.get(path, headers=mine)
        await http.post("/generate?task=absent", json={"prompt": "x"}, headers=mine)
        await http.post("/generate?task=base", content=b"{", headers=mine)
    finally:
        await _ok(http.delete(f"/tenants/{tenant}", headers=ADMIN))
    for path in ("/usage", "/audit", "/tenants", "/metrics"):
        await http.get(path, headers=ADMIN)


async def _serve_task(http: httpx2.AsyncClient, method: str, body: bytes, mine: dict[str, str]) -> None:
    zipped = {**mine, "Content-Type": "application/zip"}
    await _ok(http.post(f"/adapters?task={method}", content=body, headers=zipped))
    for path, asked in GENERATING:
        query, model = (f"?task={method}", {}) if path == "/generate" else ("", {"model": method})
        for fields in ({}, {"n": 2, "temperature": 1}, {"stream": True}):
            whole = {**asked, **model, "max_tokens": 4, **fields}
            await _ok(http.post(path + query, json=whole, headers=mine), is_json="stream" not in fields)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):  # it leaves
                long = {**asked, **model, "max_tokens": 200, "stream": True}
                await http.post(path + query, json=long, headers=mine)
    await _ok(http.put(f"/tasks/{method}/pin", json={"pinned": True}, headers=mine))
    await _ok(http.put(f"/tasks/{method}/route", json={"versions": {"1": 1}}, headers=mine))
    await _ok(http.get(f"/tasks/{method}/versions/1/artifact", headers=mine), is_json=False)
    await _ok(http.delete(f"/tasks/{method}", headers=mine), is_json=False)


async def _ok(asking: Any, is_json: bool = True) -> Any:
    answer = await asking
    assert answer.status_code < 300, (answer.request.url, answer.status_code, answer.text[:300])
    return answer.json() if is_json and answer.content else None


async def series_of(http: httpx2.AsyncClient) -> int:
    """The number of series of the server's metrics."""
    return len(Reading.of((await http.get("/metrics", headers=ADMIN)).text).samples)


def counts_of(process: psutil.Process, name: str) -> dict[str, float]:
    """File descriptors and threads of a process."""
    return {f"{name} fds": process.num_fds(), f"{name} threads": process.num_threads()}


def memory_of(process: psutil.Process) -> float:
    """Memory in MB that is no file's, for other programs' use of a file would count: what is shared counts in parts."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(size) for name, size, _ in (line.split() for line in lines)}
    return sum(sizes[f"{name}:"] for name in ("Pss_Anon", "Pss_Shmem", "SwapPss")) / 1024


async def soak(url: str, front: psutil.Process, bodies: Mapping[str, bytes], seconds: float) -> Samples:
    """Churn for so long, and sample; one line a minute is printed."""
    samples, began, num_lives = Samples(), time.monotonic(), 0

    async def work(number: int, http: httpx2.AsyncClient) -> None:
        nonlocal num_lives
        for life in itertools.count():  # a tenant's name is given once
            await live_and_die(http, f"soak-{number}-{life}", bodies)
            num_lives += 1
            if time.monotonic() >= began + seconds:
                return

    async with httpx2.AsyncClient(base_url=url, timeout=120) as http:
        working = [asyncio.create_task(work(number, http)) for number in range(NUM_WORKERS)]
        while not all(one.done() for one in working):
            (parent,) = front.children()
            (engine,) = parent.children()
            numbers = counts_of(front, "front") | counts_of(parent, "parent") | counts_of(engine, "engine")
            parts = {
                "front": [front],
                "parent": [parent],
                "engine": [engine],
                "loaders": engine.children(recursive=True),
            }
            held = {f"{name} MB": sum(map(memory_of, processes)) for name, processes in parts.items()}
            numbers |= held | {"memory": sum(held.values())}
            numbers["series"] = await series_of(http)
            samples.add(time.monotonic() - began, numbers)
            if len(samples.seconds) % 10 == 1:
                told = ", ".join(f"{name} {number:.0f}" for name, number in numbers.items())
                print(f"{samples.seconds[-1]:5.0f} s, {num_lives} lives: {told}", flush=True)
            await asyncio.sleep(SAMPLE_EVERY_S)
        await asyncio.gather(*working)
    return samples


def draw(samples: Samples, path: Path) -> None:
    """Draw every number over time, as a part of its value after the first quarter."""
    figure = Figure(figsize=(10, 6))
    axes = figure.subplots()
    for name, numbers in samples.numbers.items():
        axes.plot(samples.seconds, np.array(numbers) / numbers[len(numbers) // 4], label=name)
    axes.set_xlabel("seconds")
    axes.set_ylabel("of the value after the first quarter")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def bodies_of(base: Path, folder: Path, methods: tuple[str, ...]) -> dict[str, bytes]:
    """An upload of each method."""
    return {method: zip_folder(FAMILIES[method](folder / method, base, 0)) for method in methods}


async def main() -> int:
    """Run the command. Returns 1 if anything grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--base", default="tiny", help="tiny, or what `manyhats serve --base` takes")
    parser.add_argument("--plot", type=Path, default=Path("soak.png"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        base = make_tiny_base(scratch / "base") if given.base == "tiny" else resolve_base(given.base)
        bodies = bodies_of(base, scratch, tuple(FAMILIES))
        os.environ["MANYHATS_ADMIN_KEY"] = KEY
        # A cache that is full soon: memory of blocks that were never used is not there yet.
        options: dict[str, Any] = {"kv_cache_bytes": 2**22, "num_threads": 1, "log_level": "error"}
        with serve(base, scratch / "data", **options) as server:
            front = psutil.Process(server.process.pid)
            samples = await soak(server.url, front, bodies, 60 * given.minutes)
    draw(samples, given.plot)
    for name in samples.numbers:
        print(f"{name}: {samples.numbers[name][-1]:.0f}, grew by {samples.growth(name):+.1%} after the first quarter")
    return int(bool(samples.grown()))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
