"""Kill or stop the engine at random moments under mixed streams: `python -m tests.server.kills --help`.

Every stream must equal what its request gets alone. The suite strikes once; the command as often as it is told to.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters_store.base.resolve import resolve_base
from tests.kit.adapters import zip_folder
from tests.kit.families import FAMILIES
from tests.kit.tiny import make_tiny_base
from tests.server.world import Site, serve_real, until

METHODS = ("lora", "dora", "ia3", "bottleneck-houlsby", "prompt-tuning", "prefix-tuning", "beft")
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 1.2, "frequency_penalty": 1.5, "repetition_penalty": 1.1},
    {"temperature": 0.7, "top_k": 20, "logprobs": 2},
)
NUM_STREAMS = 16
MOST_UNTIL_READY_S = 8.0


@dataclass
class Tally:
    """Streams that ended as they do alone, and those that did not; seconds from each blow until `ready` was 503."""

    num_blows: int = 0
    num_right: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds_until_seen: list[float] = field(default_factory=list)
    seconds_until_ready: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        slowest = f"{max(self.seconds_until_seen):.1f} s, ready again after {max(self.seconds_until_ready):.1f} s"
        told = f"{self.num_blows} blows: {self.num_right} right, {len(self.wrong)} wrong; seen after {slowest} at most"
        return "\n  ".join([told, *self.wrong])


async def strike(
    site: Site,
    num_blows: int,
    blow: signal.Signals,
    max_tokens: int,
    on_blow: Callable[[Tally], None] = lambda _tally: None,
) -> Tally:
    """Strike the engine of a site that has a task a method so often, each time under `NUM_STREAMS` streams."""
    chance, tally = random.Random(num_blows), Tally()
    tasks = ["base", *METHODS]
    asked = [
        (
            tasks[at % len(tasks)],
            {"prompt": f"Tell me {at}: ", "max_tokens": max_tokens, "ignore_eos": True, "seed": at, "timeout_s": 3600},
        )
        for at in range(NUM_STREAMS)
    ]
    bodies = [(task, body | KINDS[at // 2 % len(KINDS)]) for at, (task, body) in enumerate(asked)]
    began = time.monotonic()
    alone = [await tokens_of(site, task, body) for task, body in bodies]
    whole_s = (time.monotonic() - began) / 3  # about what they take together
    for _ in range(num_blows):
        streams = [asyncio.create_task(tokens_of(site, task, body)) for task, body in bodies]
        await until(lambda: len(site.process.in_flight.requests) + sum(s.done() for s in streams) == NUM_STREAMS, 60)  # noqa: B023 - called at once
        await asyncio.sleep(chance.random() * whole_s)
        assert site.process.pid is not None
        os.kill(site.process.pid, blow)
        struck = time.monotonic()
        await until(lambda: site.process.ready is None, 60)
        tally.seconds_until_seen.append(time.monotonic() - struck)
        await until(lambda: site.process.ready is not None, 60)
        tally.seconds_until_ready.append(time.monotonic() - struck)
        found = await asyncio.gather(*streams, return_exceptions=True)
        tally.num_blows += 1
        for (task, body), want, got in zip(bodies, alone, found, strict=True):
            if got == want:
                tally.num_right += 1
            else:
                tally.wrong.append(f"{task} {body}: {got} instead of {want}")
        on_blow(tally)
    return tally


async def tokens_of(site: Site, task: str, body: dict[str, Any]) -> list[int]:
    """The tokens of a stream, as they come."""
    events = await site.events(f"/generate?task={task}", **body)
    return [token for event in events for token in event["token_ids"]]


async def upload_all(site: Site, base: Path, scratch: Path) -> None:
    """Make a task of each method."""
    for number, method in enumerate(METHODS):
        folder = FAMILIES[method](scratch / method, base, number)
        answer = await site.upload(method, zip_folder(folder))
        assert answer.status_code == 201, answer.text


async def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="tiny", help="tiny, or what `manyhats serve --base` takes")
    parser.add_argument("--blows", type=int, default=20)
    parser.add_argument("--signal", choices=["SIGKILL", "SIGSTOP", "SIGSEGV"], default="SIGKILL")
    parser.add_argument("--max-tokens", type=int, default=48)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        base = make_tiny_base(scratch / "base") if given.base == "tiny" else resolve_base(given.base)
        limits = {"max_running": NUM_STREAMS, "max_waiting": 64, "kv_cache_bytes": 2**28, "num_threads": 2}
        async with serve_real(base, scratch / "data", **limits) as site:
            await upload_all(site, base, scratch)
            tally = await strike(site, given.blows, signal.Signals[given.signal], given.max_tokens, print)
    if tally.wrong or max(tally.seconds_until_ready) > MOST_UNTIL_READY_S:
        sys.exit(f"not every stream was right, or an engine was away for over {MOST_UNTIL_READY_S:g} s")


if __name__ == "__main__":
    asyncio.run(main())
